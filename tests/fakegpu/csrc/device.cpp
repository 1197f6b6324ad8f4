#include "device.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <pthread.h>

#include <cstdlib>

namespace fakegpu {

// -- lock and GIL -----------------------------------------------------------------------------------------------------------

namespace {
struct Python {
    int (*holds)() = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    void* (*save)() = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    void (*restore)(void*) = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
};
Python& python() {
    static Python p;
    return p;
}
bool g_forked = false;
}  // namespace

std::recursive_mutex& g_mutex = *new std::recursive_mutex;
std::condition_variable_any& g_changed = *new std::condition_variable_any;

WithoutGil::WithoutGil() {
    if (python().holds && python().holds()) saved_ = python().save();
}
WithoutGil::~WithoutGil() {
    if (saved_) python().restore(saved_);
}
Lock::Lock() : std::unique_lock<std::recursive_mutex>(g_mutex, std::defer_lock) {
    TORCH_CHECK(!g_forked, "fakegpu: the device was used before this process was forked; use it after the fork only, or start processes with spawn");
    if (!try_lock()) {
        WithoutGil without;
        lock();
    }
}

// -- the device -------------------------------------------------------------------------------------------------------------

Machine& g_machine = *new Machine;
thread_local int t_device = 0;
namespace {
thread_local int t_stream[kMaxDevices] = {-1, -1, -1, -1};

double setting(const char* name, double otherwise) {
    const char* const value = std::getenv(name);
    return value ? std::atof(value) : otherwise;
}
}  // namespace

int device_count() {
    static const int n = static_cast<int>(setting("FAKEGPU_DEVICES", 2));
    return n;
}

void open_once() {
    static const bool done = [] {
        const auto gib = [](const char* name) { return static_cast<size_t>(setting(name, 8) * (size_t{1} << 30)); };
        for (int d = 0; d < device_count(); ++d) {
            g_device_memory[d].open(gib("FAKEGPU_GIB"), false);
            new_stream(d, false);  // streams 0, 1, … are the devices' default streams
        }
        g_pinned_memory.open(gib("FAKEGPU_PINNED_GIB"), true);
        install_trap();
        pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
        return true;
    }();
    (void)done;
}

int new_stream(int device, bool is_side) {
    TORCH_CHECK(g_machine.n_streams < kNowhere, "fakegpu: too many streams");
    Stream& stream = g_machine.streams[g_machine.n_streams];
    stream.device = device, stream.id = g_machine.n_streams, stream.is_side = is_side;
    return g_machine.n_streams++;
}
int current_stream(int device) { return t_stream[device] < 0 ? device : t_stream[device]; }
void set_current_stream(int device, int stream) { t_stream[device] = stream; }

// -- running ------------------------------------------------------------------------------------------------------------------

namespace {
bool is_ready(const Stream& stream) {
    if (stream.queue.empty() || stream.running) return false;
    const Operation& next = stream.queue.front();
    return next.waits_for < 0 || g_machine.streams[next.waits_for].done >= next.waits_for_epoch;
}

// Modelled time does not depend on when an operation really runs.
void advance_time(Stream& stream, const Operation& op) {
    double start = std::max(stream.end_us, op.not_before_us);
    if (op.waits_for >= 0) {
        const Stream& other = g_machine.streams[op.waits_for];
        const auto ended = other.ended_us.lower_bound(op.waits_for_epoch);
        const double until = ended == other.ended_us.end() ? other.end_us : ended->second;
        if (until > start) stream.stall_us += until - start, start = until;
    }
    stream.end_us = start + op.cost_us;
    stream.ended_us[op.epoch] = stream.end_us;
    if (stream.ended_us.size() > 4096) stream.ended_us.erase(stream.ended_us.begin());
}

std::string run_kernel(const Operation& op) {
    using c10::DispatchKey;
    try {
        const c10::impl::ExcludeDispatchKeyGuard plain(
            c10::autograd_dispatch_keyset | c10::DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::PythonDispatcher,
                                                                 DispatchKey::Functionalize, DispatchKey::ADInplaceOrView, DispatchKey::AutocastPrivateUse1,
                                                                 DispatchKey::AutocastCPU}));
        if (op.run) op.run();
        return {};
    } catch (const std::exception& error) {
        return op.name + ": " + error.what();
    }
}

void finish(Stream& stream, const Operation& op, const std::string& failure) {
    if (!failure.empty() && g_machine.failure.empty()) g_machine.failure = failure;
    advance_time(stream, op);
    stream.done = op.epoch;
}

void run_front(Stream& stream) {
    const Operation op = std::move(stream.queue.front());
    stream.queue.pop_front();
    finish(stream, op, run_kernel(op));
}

// Exactly what (stream, epoch) needs, and nothing else.
void force(int id, uint64_t epoch) {
    Stream& stream = g_machine.streams[id];
    while (stream.done < epoch) {
        TORCH_CHECK(!stream.queue.empty(), "fakegpu: internal error: nothing to run");
        const Operation& next = stream.queue.front();
        if (next.waits_for >= 0 && g_machine.streams[next.waits_for].done < next.waits_for_epoch) force(next.waits_for, next.waits_for_epoch);
        run_front(stream);
    }
}

enum class Which { kAll, kDefault, kSide };
bool step(Which which) {
    int ready[kMaxStreams], n = 0;
    for (int i = 0; i < g_machine.n_streams; ++i) {
        const Stream& stream = g_machine.streams[i];
        if (is_ready(stream) && !g_machine.starved.count(i) && (which == Which::kAll || stream.is_side == (which == Which::kSide))) ready[n++] = i;
    }
    if (!n) return false;
    run_front(g_machine.streams[ready[g_machine.random() % static_cast<unsigned>(n)]]);
    return true;
}

void work(int id) {
    std::unique_lock<std::recursive_mutex> lock(g_mutex);
    Stream& stream = g_machine.streams[id];
    for (;;) {
        while (!is_ready(stream)) g_changed.wait(lock);
        const Operation op = std::move(stream.queue.front());
        stream.queue.pop_front();
        stream.running = true;
        lock.unlock();
        const std::string failure = run_kernel(op);
        lock.lock();
        finish(stream, op, failure);
        stream.running = false;
        g_changed.notify_all();
    }
}

void after_giving(Stream& stream) {
    Machine& g = g_machine;
    switch (g.schedule) {
        case Schedule::kEager:
            while (step(Which::kAll)) {
            }
            break;
        case Schedule::kLazy:
            break;
        case Schedule::kCopyLate:
            while (step(Which::kDefault)) {
            }
            break;
        case Schedule::kComputeLate:
            while (step(Which::kSide)) {
            }
            break;
        case Schedule::kRandom:
            for (auto n = g.random() % 8 ? g.random() % 4 : 64; n && step(Which::kAll); --n) {
            }
            break;
        case Schedule::kThreads:
            if (!stream.worker.joinable()) stream.worker = std::thread(work, stream.id);
            g_changed.notify_all();
            break;
    }
}
}  // namespace

bool step_any() { return step(Which::kAll); }
void step_towards(int id) {
    Stream& stream = g_machine.streams[id];
    if (stream.queue.empty()) return;
    const Operation& next = stream.queue.front();
    if (next.waits_for >= 0) force(next.waits_for, next.waits_for_epoch);
    run_front(stream);
}

void wait_until(int id, uint64_t epoch, Lock& lock) {
    Machine& g = g_machine;
    if (g.schedule == Schedule::kThreads) {
        if (g.streams[id].done >= epoch) return;
        const WithoutGil without;
        while (g.streams[id].done < epoch) g_changed.wait(lock);
        return;
    }
    if (g.schedule == Schedule::kRandom)
        while (g.streams[id].done < epoch && g.random() % 3 && step_any()) {
        }
    force(id, epoch);
}

namespace {
std::set<Host*>& hosts() {
    static std::set<Host*>& all = *new std::set<Host*>;
    return all;
}
struct OwnHost {
    Host host;
    OwnHost() { hosts().insert(&host); }
    ~OwnHost() {
        const std::lock_guard<std::recursive_mutex> lock(g_mutex);
        hosts().erase(&host);
    }
};
}  // namespace

// The caller holds the lock.
Host& this_host() {
    thread_local OwnHost own;
    return own.host;
}

void host_knows(const Clock& clock, double us) {
    Host& host = this_host();
    host.clock.join(clock);
    host.us = std::max(host.us, us);
    restore_views(host.clock);
}

void raise_failure() {
    if (g_machine.failure.empty()) return;
    const std::string text = g_machine.failure;
    if (!g_machine.sticky) g_machine.failure.clear();
    TORCH_CHECK(false, "fakegpu: an asynchronous operation failed: ", text);
}

// -- races --------------------------------------------------------------------------------------------------------------------

namespace {
void check_races(const Touch& touch, int stream, uint64_t epoch, const Clock& clock, const std::string& name) {
    Block* const block = find_block(reinterpret_cast<const void*>(touch.region.first));
    if (!block) return;
    std::vector<Access> keep;
    for (Access& earlier : block->accesses) {
        const bool hits = overlap(earlier.region, touch.region), ordered = clock.knows(earlier.stream, earlier.epoch);
        if (g_machine.races && hits && !ordered && (earlier.write || touch.write))
            violation("RACE: %s by '%s' (stream %d, operation %llu) is not ordered after the %s by '%s' (stream %d, operation %llu): %s memory, bytes %zu-%zu of a block of %zu",
                      touch.write ? "write" : "read", name.c_str(), stream, static_cast<unsigned long long>(epoch), earlier.write ? "write" : "read",
                      earlier.op.c_str(), earlier.stream, static_cast<unsigned long long>(earlier.epoch), block->pinned ? "pinned" : "device",
                      touch.region.first - reinterpret_cast<size_t>(block->at), touch.region.end() - reinterpret_cast<size_t>(block->at), block->n_bytes);
        const bool replaced = ordered && covers(touch.region, earlier.region) && (touch.write || !earlier.write);
        // Whoever may give out something later knows of it.
        const bool settled = std::all_of(hosts().begin(), hosts().end(), [&](const Host* host) { return host->clock.knows(earlier.stream, earlier.epoch); });
        if (!replaced && !settled) keep.push_back(std::move(earlier));
    }
    keep.push_back({touch.region, touch.write, stream, epoch, name});
    block->accesses.swap(keep);
}
}  // namespace

uint64_t give(int id, const std::string& name, std::vector<Touch> touches, std::function<void()> run, bool is_copy, double cost_us) {
    Machine& g = g_machine;
    if (g.sticky) raise_failure();
    Stream& stream = g.streams[id];
    if (stream.capturing) {  // nothing runs before the replay
        g.graph.push_back({name, std::move(run), std::move(touches), is_copy});
        return stream.given;
    }
    Operation op;
    op.name = name, op.epoch = ++stream.given, op.is_copy = is_copy;
    stream.clock.join(this_host().clock);
    stream.clock.at[id] = op.epoch;
    size_t n_bytes = 0;
    for (const Touch& touch : touches) {
        n_bytes += touch.region.row_bytes * touch.region.rows;
        check_races(touch, id, op.epoch, stream.clock, name);
    }
    if (cost_us >= 0)
        op.cost_us = cost_us;
    else if (is_copy)
        op.cost_us = static_cast<double>(n_bytes) / static_cast<double>(std::max<size_t>(touches.size(), 1)) / (g.copy_gb_s * 1e3);
    else
        op.cost_us = g.launch_us + static_cast<double>(n_bytes) / (g.memory_gb_s * 1e3);
    ++g.operations;
    g.copies += is_copy;
    if (is_copy && name == "copy to host" && !touches.empty())
        g.bytes_to_host += touches.front().region.row_bytes * touches.front().region.rows;  // of its source
    if (is_copy && g.copies_until_failure >= 0 && g.copies_until_failure-- == 0)
        run = [] { TORCH_CHECK(false, "the copy engine reported an error (as the test wants)"); };
    op.run = std::move(run);
    op.not_before_us = this_host().us;
    stream.queue.push_back(std::move(op));
    const uint64_t epoch = stream.given;
    after_giving(stream);
    return epoch;
}

void give_wait(int id, int for_stream, uint64_t for_epoch, const Clock& clock) {
    Stream& stream = g_machine.streams[id];
    if (stream.capturing) {
        if (for_stream != id) violation("CAPTURE: stream %d is being captured, and waits for an event of stream %d, which is not: the capture is lost", id, for_stream);
        return;
    }
    stream.clock.join(clock);
    Operation op;
    op.name = "event.wait", op.epoch = ++stream.given, op.waits_for = for_stream, op.waits_for_epoch = for_epoch;
    stream.clock.at[id] = op.epoch;
    op.not_before_us = this_host().us;
    stream.queue.push_back(std::move(op));
    after_giving(stream);
}

void replay(int id) {
    const std::vector<Captured> graph = g_machine.graph;
    for (const Captured& one : graph) give(id, one.name + " (replayed)", one.touches, one.run, one.is_copy);
}

}  // namespace fakegpu
