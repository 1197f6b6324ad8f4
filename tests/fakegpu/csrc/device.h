// Streams, their schedules, the race detector and virtual time.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common.h"
#include "memory.h"

namespace fakegpu {

enum class Schedule {
    kEager,        // everything at once
    kLazy,         // only what a synchronising host needs
    kCopyLate,     // default streams at once, others only when forced
    kComputeLate,  // the reverse
    kRandom,       // seeded
    kThreads,      // one worker thread per stream
};

struct Touch {
    Region region;
    bool write;
};

struct Operation {
    std::string name;
    std::function<void()> run;
    uint64_t epoch = 0;
    int waits_for = -1;  // stream; with the epoch there
    uint64_t waits_for_epoch = 0;
    double not_before_us = 0, cost_us = 0;
    bool is_copy = false;
};

struct Stream {
    int device = 0, id = 0;
    bool is_side = false;
    std::deque<Operation> queue;
    uint64_t given = 0, done = 0;  // epochs
    Clock clock;                   // of what was given
    double end_us = 0, stall_us = 0;
    std::map<uint64_t, double> ended_us;  // by epoch
    std::thread worker;
    bool running = false;
    bool capturing = false;
};

struct Captured {
    std::string name;
    std::function<void()> run;
    std::vector<Touch> touches;
    bool is_copy;
};

struct Machine {
    Schedule schedule = Schedule::kEager;
    std::mt19937_64 random{0};
    bool poison = true, trap = true, races = true;
    Stream streams[kMaxStreams];
    int n_streams = 0;
    std::string failure;  // of an asynchronous operation: raised by the next synchronising call
    bool sticky = false;  // … and by every call after it, as the errors of a CUDA context that is lost
    std::set<int> starved;
    std::vector<int> pool[kMaxDevices];
    size_t pool_next[kMaxDevices] = {};
    double copy_gb_s = 25, memory_gb_s = 2000, launch_us = 5;
    uint64_t operations = 0, copies = 0, bytes_to_host = 0;
    long copies_until_failure = -1;
    std::vector<Captured> graph;
};
extern Machine& g_machine;
// The stream on which an event "lies" that was never recorded.
constexpr int kNowhere = kMaxStreams - 1;

int device_count();
void open_once();  // the caller holds no lock, or holds it: it is recursive

extern thread_local int t_device;
int current_stream(int device);
void set_current_stream(int device, int stream);
int new_stream(int device, bool is_side);

// Gives an operation to a stream; checks its touches for races. Returns its epoch. The caller holds the lock.
uint64_t give(int stream, const std::string& name, std::vector<Touch> touches, std::function<void()> run, bool is_copy = false, double cost_us = -1);
void give_wait(int stream, int for_stream, uint64_t for_epoch, const Clock& clock);
void wait_until(int stream, uint64_t epoch, Lock& lock);
bool step_any();              // one operation that may run
void step_towards(int stream);  // the first of this stream, with what it needs
// One thread of the host: what it has synchronised with, and its modelled time. What threads tell each other by locks and queues nobody
// sees here: work that a thread gives out on the strength of such a message must be ordered by an event, too.
struct Host {
    Clock clock;
    double us = 0;
};
Host& this_host();
// The calling thread has synchronised.
void host_knows(const Clock& clock, double us);
void raise_failure();
void replay(int stream);

}  // namespace fakegpu
