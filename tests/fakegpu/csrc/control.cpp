// What the tests drive the device with, by ctypes. Nothing throws across this border.
#include <c10/util/Exception.h>

#include <string>

#include "allocators.h"
#include "guard.h"

using namespace fakegpu;

extern "C" {

// 0, or -1: no such schedule, or a schedule that cannot be left (threads).
int fakegpu_configure(const char* schedule, uint64_t seed, int poison, int trap, int races) {
    static const std::map<std::string, Schedule> names = {{"eager", Schedule::kEager},           {"lazy", Schedule::kLazy},
                                                          {"copy_late", Schedule::kCopyLate},    {"compute_late", Schedule::kComputeLate},
                                                          {"random", Schedule::kRandom},         {"threads", Schedule::kThreads}};
    const auto found = names.find(schedule);
    if (found == names.end()) return -1;
    Lock lock;
    open_once();
    if (g_machine.schedule == Schedule::kThreads && found->second != Schedule::kThreads) return -1;
    if (g_machine.sticky) g_machine.failure.clear();
    g_machine.sticky = false;
    for (int d = 0; d < device_count(); ++d) synchronize_device(d);
    g_machine.schedule = found->second;
    g_machine.random.seed(seed);
    g_machine.poison = poison, g_machine.trap = trap, g_machine.races = races;
    g_machine.copies_until_failure = -1;
    g_machine.starved.clear();
    g_pinned_memory.limit_bytes = ~size_t{0};
    for (Arena& arena : g_device_memory) arena.limit_bytes = ~size_t{0};
    return 0;
}
void fakegpu_cost(double copy_gb_s, double memory_gb_s, double launch_us) {
    Lock lock;
    g_machine.copy_gb_s = copy_gb_s, g_machine.memory_gb_s = memory_gb_s, g_machine.launch_us = launch_us;
}
int fakegpu_violations() { return violations(); }
const char* fakegpu_violation(int i) { return violation_text(i); }
void fakegpu_clear() { clear_violations(); }
void fakegpu_starve(int stream) {
    Lock lock;
    if (stream < 0)
        g_machine.starved.clear();
    else
        g_machine.starved.insert(stream);
}
double fakegpu_stall_us(int stream) {
    Lock lock;
    return g_machine.streams[stream].stall_us;
}
double fakegpu_end_us(int stream) {
    Lock lock;
    return g_machine.streams[stream].end_us;
}
double fakegpu_host_us() {
    Lock lock;
    return this_host().us;
}
void fakegpu_advance_host_us(double us) {
    Lock lock;
    this_host().us += us;
}
uint64_t fakegpu_operations() { return g_machine.operations; }
uint64_t fakegpu_copies() { return g_machine.copies; }
uint64_t fakegpu_bytes_to_host() { return g_machine.bytes_to_host; }
void fakegpu_fail_copy(long after, bool sticky) {
    Lock lock;
    g_machine.copies_until_failure = after;
    g_machine.sticky = sticky;
    if (after < 0) g_machine.failure.clear();
}
void fakegpu_limit_device(int device, uint64_t n_bytes) {
    Lock lock;
    g_device_memory[device].limit_bytes = n_bytes;
}
void fakegpu_limit_pinned(uint64_t n_bytes) {
    Lock lock;
    g_pinned_memory.limit_bytes = n_bytes;
}
// Host memory as after cudaHostRegister: the host made it, the device may copy to it while the host does something else. Null: no room.
void* fakegpu_host_arena(uint64_t n_bytes) {
    Lock lock;
    open_once();
    Block* const block = g_pinned_memory.take(round_up(n_bytes, kPage), -1, true);
    return block ? block->at : nullptr;
}
void fakegpu_capture(int stream, int begin) {
    Lock lock;
    g_machine.streams[stream].capturing = begin;
    if (begin) g_machine.graph.clear();
}
void fakegpu_replay(int stream) {
    Lock lock;
    replay(stream);
}
int fakegpu_nowhere() { return kNowhere; }
int fakegpu_current_device() { return t_device; }
int fakegpu_device_count() { return device_count(); }

}  // extern "C"
