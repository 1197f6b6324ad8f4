// What all parts share: sizes, the lock, clocks.
#pragma once

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace fakegpu {

constexpr int kMaxStreams = 256;
constexpr int kMaxDevices = 4;
constexpr size_t kPage = 4096;

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// A vector clock: for each stream the epoch (number of the operation) up to which everything has happened before.
struct Clock {
    std::array<uint64_t, kMaxStreams> at{};
    void join(const Clock& other) {
        for (int i = 0; i < kMaxStreams; ++i) at[i] = std::max(at[i], other.at[i]);
    }
    bool knows(int stream, uint64_t epoch) const { return epoch <= at[stream]; }
};

// Lets go of Python's GIL for its lifetime, if this thread holds it. Found at run time: no link against libpython.
class WithoutGil {
public:
    WithoutGil();
    ~WithoutGil();
    WithoutGil(const WithoutGil&) = delete;

private:
    void* saved_ = nullptr;
};

// The one lock of the device. Never waits for it while holding the GIL: a worker that runs a Python kernel needs that.
// Leaked, as all globals with waiters are: glibc's destructor of a condition variable waits for them at exit.
extern std::recursive_mutex& g_mutex;
extern std::condition_variable_any& g_changed;
class Lock : public std::unique_lock<std::recursive_mutex> {
public:
    Lock();
};

}  // namespace fakegpu
