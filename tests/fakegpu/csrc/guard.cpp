#include "guard.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <torch/headeronly/version.h>

#include "allocators.h"

namespace fakegpu {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
constexpr DeviceType kType = DeviceType::PrivateUse1;

struct Event {
    int stream = kNowhere;
    uint64_t epoch = 0;
    Clock clock;
    double us() const {
        const Stream& on = g_machine.streams[stream];
        const auto ended = on.ended_us.find(epoch);
        return ended == on.ended_us.end() ? on.end_us : ended->second;
    }
    // Real devices go on as if there were nothing to wait for, which is why it must be told.
    bool recorded(const char* who) const {
        if (stream == kNowhere) violation("WAIT: %s an event that was never recorded", who);
        return stream != kNowhere;
    }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
    DeviceType type() const override { return kType; }
    Device exchangeDevice(Device device) const override {
        const Device old = getDevice();
        if (device.index() >= 0) t_device = device.index();
        return old;
    }
    Device getDevice() const override { return Device(kType, static_cast<DeviceIndex>(t_device)); }
    void setDevice(Device device) const override {
        TORCH_CHECK(device.index() < device_count(), "fakegpu: there is no device ", int{device.index()});
        if (device.index() >= 0) t_device = device.index();
    }
    void uncheckedSetDevice(Device device) const noexcept override {
        if (device.index() >= 0) t_device = device.index();
    }
    static int index(Device device) { return device.index() < 0 ? t_device : device.index(); }
    c10::Stream getStream(Device device) const override {
        open_once();
        return as_torch(current_stream(index(device)));
    }
    c10::Stream getDefaultStream(Device device) const override {
        open_once();
        return as_torch(index(device));
    }
    c10::Stream getNewStream(Device device, int /*priority*/) const override {  // from a pool of 32, in turn, as CUDA does
        Lock lock;
        open_once();
        const int d = index(device);
        auto& pool = g_machine.pool[d];
        if (pool.size() < 32) pool.push_back(new_stream(d, true));
        return as_torch(pool[g_machine.pool_next[d]++ % 32 % pool.size()]);
    }
    c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
    c10::Stream exchangeStream(c10::Stream stream) const override {
        const int d = stream.device_index();
        const c10::Stream old = as_torch(current_stream(d));
        set_current_stream(d, static_cast<int>(stream.id()));
        return old;
    }
    void* getStreamNativeHandle(const c10::Stream stream) const override { return &g_machine.streams[stream.id()]; }
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
    bool isStreamCapturing(const c10::Stream& stream) const override { return g_machine.streams[stream.id()].capturing; }
#endif
    DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(device_count()); }

    void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
    void record(void** handle, const c10::Stream& on, DeviceIndex, c10::EventFlag) const override {
        Lock lock;
        open_once();
        if (!*handle) *handle = new Event;
        Event& event = *static_cast<Event*>(*handle);
        event.stream = static_cast<int>(on.id());
        if (event.stream == kNowhere) return;
        event.epoch = give(event.stream, "event.record", {}, nullptr, false, 0);
        event.clock = g_machine.streams[event.stream].clock;
    }
    void block(void* handle, const c10::Stream& stream) const override {
        if (!handle) return;
        Lock lock;
        const Event& event = *static_cast<Event*>(handle);
        if (event.recorded("a stream waits for")) give_wait(static_cast<int>(stream.id()), event.stream, event.epoch, event.clock);
    }
    bool queryEvent(void* handle) const override {
        if (!handle) return true;
        Lock lock;
        const Event& event = *static_cast<Event*>(handle);
        if (!event.recorded("the host asks for")) return true;
        if (g_machine.streams[event.stream].done < event.epoch) {
            if (g_machine.schedule == Schedule::kRandom)  // asking makes progress, so that a loop that polls ends
                step_any();
            else if (g_machine.schedule != Schedule::kThreads)
                step_towards(event.stream);
            return false;
        }
        host_knows(event.clock, event.us());
        raise_failure();
        return true;
    }
    void synchronizeEvent(void* handle) const override {
        if (!handle) return;
        Lock lock;
        const Event& event = *static_cast<Event*>(handle);
        if (!event.recorded("the host waits for")) return;
        wait_until(event.stream, event.epoch, lock);
        host_knows(event.clock, event.us());
        raise_failure();
    }
    bool queryStream(const c10::Stream& torch_stream) const override {
        Lock lock;
        const Stream& stream = g_machine.streams[torch_stream.id()];
        if (stream.done != stream.given) {
            if (g_machine.schedule != Schedule::kThreads) step_towards(stream.id);
            return false;
        }
        host_knows(stream.clock, stream.end_us);
        return true;
    }
    void synchronizeStream(const c10::Stream& stream) const override { synchronize(static_cast<int>(stream.id())); }
    void synchronizeDevice(DeviceIndex device) const override { synchronize_device(device < 0 ? t_device : device); }
    void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override { device_allocator().recordStream(data, stream); }
    double elapsedTime(void* from, void* to, DeviceIndex) const override {
        Lock lock;
        return (static_cast<Event*>(to)->us() - static_cast<Event*>(from)->us()) / 1e3;
    }
};

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    void init() const override {
        Lock lock;
        open_once();
    }
    DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(device_count()); }
    void setCurrentDevice(DeviceIndex device) const override { t_device = device; }
    DeviceIndex getCurrentDevice() const override { return static_cast<DeviceIndex>(t_device); }
    DeviceIndex exchangeDevice(DeviceIndex device) const override {
        const auto old = static_cast<DeviceIndex>(t_device);
        if (device >= 0) t_device = device;
        return old;
    }
    DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
    bool isPinnedPtr(const void* p) const override { return g_pinned_memory.owns(p); }
    at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
    Device getDeviceFromPtr(void* p) const override {
        for (int d = 0; d < device_count(); ++d)
            if (g_device_memory[d].owns(p)) return Device(kType, static_cast<DeviceIndex>(d));
        TORCH_CHECK(false, "fakegpu: not a device pointer");
    }
    const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
    at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n_bytes) const override {
        const c10::DeviceGuard on(storage.device());
        auto data = device_allocator().allocate(n_bytes);
        const size_t common = std::min(n_bytes, storage.nbytes());
        if (common) device_allocator().copy_data(data.get(), storage.data(), common);
        storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
        storage.unsafeGetStorageImpl()->set_nbytes(n_bytes);
    }
};

const bool g_registered = [] {
    c10::SetAllocator(kType, &device_allocator());
    at::setHostAllocator(kType, &pinned_allocator());
    static c10::impl::DeviceGuardImplRegistrar registrar(kType, new Guard);
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    return true;
}();

}  // namespace

c10::Stream as_torch(int stream) {
    return c10::Stream(c10::Stream::UNSAFE, Device(kType, static_cast<DeviceIndex>(g_machine.streams[stream].device)), stream);
}
const c10::impl::DeviceGuardImplInterface& guard() {
    static const Guard g;
    return g;
}
void order(int first, int then) {
    void* event = nullptr;
    guard().record(&event, as_torch(first), -1, c10::EventFlag::PYTORCH_DEFAULT);
    guard().block(event, as_torch(then));
    guard().destroyEvent(event, 0);
}
void synchronize(int id) {
    Lock lock;
    Stream& stream = g_machine.streams[id];
    if (stream.capturing) {
        violation("CAPTURE: the host synchronises with stream %d, which is being captured: the capture is lost", id);
        return;
    }
    const uint64_t epoch = stream.given;
    const Clock clock = stream.clock;
    wait_until(id, epoch, lock);
    const auto ended = stream.ended_us.find(epoch);
    host_knows(clock, ended == stream.ended_us.end() ? stream.end_us : ended->second);
    raise_failure();
}
void synchronize_device(int device) {
    {
        Lock lock;
        open_once();
    }
    for (int i = 0; i < g_machine.n_streams; ++i)
        if (g_machine.streams[i].device == device) synchronize(i);
}

}  // namespace fakegpu
