// Runs the text of a CUDA kernel on the CPU. Each thread of a block is a fiber; at __syncthreads() the next one runs,
// in an order that the seed shuffles anew for each stretch between barriers. So a missing barrier gives wrong results
// in nearly every run, and threads that wait at different barriers, or end while others wait, end the program.
//
// Blocks run one after another: races between blocks, and everything about speed, only a device can show.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define FASTCKPT_GRID_EMULATOR
#define __global__
#define __shared__ static  // of one block at a time
#define __syncthreads() grid_emulator::wait_at_barrier(__LINE__)

struct Place {
    unsigned x;
};
inline Place threadIdx, blockIdx, blockDim, gridDim;

inline void atomicAdd(unsigned long long* at, unsigned long long n) { *at += n; }

namespace grid_emulator {

constexpr size_t kStackBytes = 256 << 10;  // sanitizers need much

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool ended;
    int line;  // of the barrier that it waits at
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;

inline void wait_at_barrier(int line) {
    fibers[current].line = line;
    swapcontext(&fibers[current].context, &scheduler);
}

inline void run_fiber() {
    body();
    fibers[current].ended = true;
    swapcontext(&fibers[current].context, &scheduler);
}

[[noreturn]] inline void refuse(const char* why, int line) {
    std::fprintf(stderr, "grid emulator: %s (line %d)\n", why, line);
    std::abort();
}

inline void begin_fibers() {
    for (Fiber& fiber : fibers) {
        fiber.ended = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_fiber, 0);
    }
}

inline void run_block(std::vector<unsigned>& order, std::mt19937_64& random) {
    begin_fibers();
    for (size_t ended = 0; ended < fibers.size();) {  // from one barrier to the next
        std::shuffle(order.begin(), order.end(), random);
        int line = 0;
        for (const unsigned i : order) {
            if (fibers[i].ended) refuse("some threads have ended while others wait", line);
            current = i;
            threadIdx.x = i;
            swapcontext(&scheduler, &fibers[i].context);
            ended += fibers[i].ended;
            if (fibers[i].ended) continue;
            if (line && line != fibers[i].line) refuse("threads of a block wait at different barriers", line);
            line = fibers[i].line;
        }
        if (ended && ended < fibers.size()) refuse("some threads have ended while others wait", line);
    }
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, unsigned long long seed, Arguments... arguments) {
    std::mt19937_64 random(seed);
    gridDim.x = blocks;
    blockDim.x = threads;
    fibers.resize(threads);
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    body = [=] { kernel(arguments...); };
    for (unsigned block = 0; block < blocks; ++block) {
        blockIdx.x = block;
        run_block(order, random);
    }
}

}  // namespace grid_emulator
