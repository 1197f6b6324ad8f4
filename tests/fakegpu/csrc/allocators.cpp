#include "allocators.h"

#include <cstring>

namespace fakegpu {
namespace {

using c10::DeviceType;

void free_device(void* context) {
    if (!context) return;
    Lock lock;
    Block* const block = static_cast<Block*>(context);
    g_device_memory[g_machine.streams[block->stream].device].give_back(block);
}

struct DeviceAllocator final : c10::DeviceAllocator {
    c10::DataPtr allocate(size_t n_bytes) override {
        Lock lock;
        open_once();
        const c10::Device device(DeviceType::PrivateUse1, static_cast<c10::DeviceIndex>(t_device));
        if (!n_bytes) return {nullptr, nullptr, free_device, device};
        const int stream = current_stream(t_device);
        Block* const block = g_device_memory[t_device].take(round_up(n_bytes, 512), stream, false);
        TORCH_CHECK_WITH(OutOfMemoryError, block, "fakegpu out of memory: tried to allocate ", n_bytes, " bytes");
        if (g_machine.poison) {
            // Also a write by the stream that allocates: whoever still reads the block's former content races with it.
            char* const to = shadow(block->at);
            const size_t n = block->n_bytes;
            give(stream, "allocation", {{{reinterpret_cast<size_t>(block->at), n, 0, 1}, true}}, [to, n] { std::memset(to, 0xCB, n); }, false, 0);
        }
        return {block->at, block, free_device, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return free_device; }
    void copy_data(void* to, const void* from, size_t n) const override {
        Lock lock;
        char *const target = shadow(to), *const source = shadow(from);
        give(current_stream(t_device), "copy_data", {{{reinterpret_cast<size_t>(from), n, 0, 1}, false}, {{reinterpret_cast<size_t>(to), n, 0, 1}, true}},
             [=] { std::memcpy(target, source, n); });
    }
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {}
    void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
        Lock lock;
        const int id = static_cast<int>(stream.id());
        if (data.get()) note_use(data.get(), id);
    }
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
        Lock lock;
        const Arena& arena = g_device_memory[device];
        c10::CachingDeviceAllocator::DeviceStats stats;
        for (auto* one : {&stats.allocated_bytes, &stats.active_bytes}) {
            (*one)[0].current = static_cast<int64_t>(arena.live());
            (*one)[0].peak = static_cast<int64_t>(arena.peak());
        }
        stats.reserved_bytes[0].current = static_cast<int64_t>(arena.reserved());
        return stats;
    }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex device) override { g_device_memory[device].reset_peak(); }
    std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
        const Arena& arena = g_device_memory[device];
        return {arena.capacity() - arena.live(), arena.capacity()};
    }
};

void free_pinned(void* context) {
    if (!context) return;
    Lock lock;
    Block* const block = static_cast<Block*>(context);
    g_pinned_memory.give_back(block);
}

struct PinnedAllocator final : at::HostAllocator {
    at::DataPtr allocate(size_t n_bytes) override {
        Lock lock;
        open_once();
        if (!n_bytes) return {nullptr, nullptr, free_pinned, at::kCPU};
        size_t room = kPage;  // powers of two, as torch's own
        while (room < n_bytes) room *= 2;
        Block* const block = g_pinned_memory.take(room, -1, true);
        TORCH_CHECK(block, "fakegpu: host memory cannot be pinned: ", n_bytes, " bytes");
        return {block->at, block, free_pinned, at::kCPU};
    }
    c10::DeleterFnPtr raw_deleter() const override { return free_pinned; }
    void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
    bool record_event(void* p, void*, c10::Stream stream) override {
        Lock lock;
        note_use(p, static_cast<int>(stream.id()));
        return true;
    }
    void empty_cache() override {}
    at::HostStats get_stats() override {
        at::HostStats stats;
        stats.allocated_bytes.current = static_cast<int64_t>(g_pinned_memory.reserved());
        stats.active_bytes.current = static_cast<int64_t>(g_pinned_memory.live());
        return stats;
    }
    void reset_accumulated_stats() override {}
    void reset_peak_stats() override {}
};

}  // namespace

c10::DeviceAllocator& device_allocator() {
    static DeviceAllocator& allocator = *new DeviceAllocator;
    return allocator;
}
at::HostAllocator& pinned_allocator() {
    static PinnedAllocator& allocator = *new PinnedAllocator;
    return allocator;
}
void note_use(const void* p, int stream) {
    Block* const block = find_block(p);
    if (block && stream != block->stream) block->used_by.insert(stream);
}

}  // namespace fakegpu
