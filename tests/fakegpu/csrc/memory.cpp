#include "memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include "device.h"

namespace fakegpu {

Arena g_device_memory[kMaxDevices];
Arena g_pinned_memory;

// -- regions ------------------------------------------------------------------------------------------------------------

bool overlap(const Region& a, const Region& b) {
    if (a.first >= b.end() || b.first >= a.end()) return false;
    const size_t stride = std::max(a.stride, b.stride);
    const bool same = (a.rows == 1 || a.stride == stride) && (b.rows == 1 || b.stride == stride);
    if (!stride || !same || a.row_bytes > stride || b.row_bytes > stride) return true;
    // Columns of the same matrix, on a circle of one row: where the first rows lie does not matter, as both go past there.
    const size_t apart = (b.first + stride - a.first % stride) % stride;
    return apart < a.row_bytes || apart + b.row_bytes > stride;
}

bool covers(const Region& outer, const Region& inner) {
    if (outer.rows == 1) return outer.first <= inner.first && inner.end() <= outer.end();
    return outer.first == inner.first && outer.stride == inner.stride && outer.rows == inner.rows && outer.row_bytes >= inner.row_bytes;
}

// -- reports ------------------------------------------------------------------------------------------------------------

namespace {
constexpr int kReports = 64;
char g_reports[kReports][480];
volatile int g_count = 0;
}  // namespace

void violation(const char* format, ...) {
    const int i = __sync_fetch_and_add(&g_count, 1);
    if (i >= kReports) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(g_reports[i], sizeof g_reports[i], format, arguments);
    va_end(arguments);
}
int violations() { return g_count; }
const char* violation_text(int i) { return i >= 0 && i < kReports ? g_reports[i] : ""; }
void clear_violations() { g_count = 0; }

// -- arenas -------------------------------------------------------------------------------------------------------------

void Arena::open(size_t n_bytes, bool host_may_touch) {
    const int fd = memfd_create("fakegpu", 0);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(n_bytes))) throw std::runtime_error("fakegpu: no memory file");
    const int protection = host_may_touch ? PROT_READ | PROT_WRITE : PROT_NONE;
    void* const view = mmap(nullptr, n_bytes, protection, MAP_SHARED | MAP_NORESERVE, fd, 0);
    void* const second = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    close(fd);
    if (view == MAP_FAILED || second == MAP_FAILED) throw std::runtime_error("fakegpu: no address space");
    view_ = static_cast<char*>(view), shadow_ = static_cast<char*>(second), capacity_ = n_bytes;
}

Block* Arena::find(const void* p) {
    auto after = blocks_.upper_bound(static_cast<const char*>(p));
    if (after == blocks_.begin()) return nullptr;
    Block* const block = std::prev(after)->second;
    return p < block->at + block->n_bytes ? block : nullptr;
}

void Arena::collect() {
    std::vector<Block*> still;
    for (Block* block : waiting_) {
        const auto& after = block->reuse_after;
        const bool done = std::all_of(after.begin(), after.end(), [](auto& use) { return g_machine.streams[use.first].done >= use.second; });
        if (!done) {
            still.push_back(block);
            continue;
        }
        // Those have ended; accesses by streams that nobody has told of may still race with the next owner's.
        const auto ended = [&](const Access& access) {
            const auto use = after.find(access.stream);
            return use != after.end() && access.epoch <= use->second;
        };
        block->accesses.erase(std::remove_if(block->accesses.begin(), block->accesses.end(), ended), block->accesses.end());
        block->reuse_after.clear();
        free_[{block->stream, block->n_bytes}].push_back(block);
    }
    waiting_.swap(still);
}

Block* Arena::take(size_t n_bytes, int stream, bool pinned) {
    if (live_ + n_bytes > limit_bytes) return nullptr;
    collect();
    auto& kept = free_[{stream, n_bytes}];
    Block* block;
    if (!kept.empty()) {
        block = kept.back();
        kept.pop_back();
    } else {
        if (used_ + n_bytes > capacity_) return nullptr;
        block = new Block{view_ + used_, n_bytes, stream, pinned, false, {}, {}, {}};
        used_ += n_bytes;
        blocks_[block->at] = block;
    }
    block->of_graph = !pinned && g_machine.streams[stream].capturing;
    live_ += n_bytes;
    peak_ = std::max(peak_, live_);
    return block;
}

void Arena::give_back(Block* block) {
    live_ -= block->n_bytes;
    if (block->of_graph) return;
    for (int stream : block->used_by) block->reuse_after[stream] = g_machine.streams[stream].given;
    block->used_by.clear();
    if (block->reuse_after.empty())
        free_[{block->stream, block->n_bytes}].push_back(block);
    else
        waiting_.push_back(block);
}

Block* find_block(const void* p) {
    for (Arena& arena : g_device_memory)
        if (arena.owns(p)) return arena.find(p);
    return g_pinned_memory.owns(p) ? g_pinned_memory.find(p) : nullptr;
}

char* shadow(const void* p) {
    for (Arena& arena : g_device_memory)
        if (arena.owns(p)) return arena.shadow(p);
    return g_pinned_memory.owns(p) ? g_pinned_memory.shadow(p) : static_cast<char*>(const_cast<void*>(p));
}

// -- the host's view of pinned memory ---------------------------------------------------------------------------------------

namespace {
struct Revoked {
    size_t first, end;
    int protection, stream;
    uint64_t epoch;
};
std::vector<Revoked>& g_revoked = *new std::vector<Revoked>;

void protect(const Revoked& r, int protection) { mprotect(reinterpret_cast<void*>(r.first), r.end - r.first, protection); }

struct sigaction g_previous;

void on_fault(int, siginfo_t* info, void*) {
    char* const p = static_cast<char*>(info->si_addr);
    char* const page = reinterpret_cast<char*>(reinterpret_cast<size_t>(p) / kPage * kPage);
    if (g_pinned_memory.owns(p)) {
        for (const Revoked& r : g_revoked)
            if (reinterpret_cast<size_t>(p) >= r.first && reinterpret_cast<size_t>(p) < r.end) {
                violation("HOST ACCESS: the host touched pinned memory whose copy (stream %d, operation %llu) it has not synchronised with",
                          r.stream, static_cast<unsigned long long>(r.epoch));
                protect(r, PROT_READ | PROT_WRITE);
                return;
            }
        mprotect(page, kPage, PROT_READ | PROT_WRITE);  // another thread has just synchronised
        return;
    }
    for (Arena& arena : g_device_memory)
        if (arena.owns(p)) {
            violation("HOST ACCESS: the host dereferenced device memory");
            mprotect(page, kPage, PROT_READ | PROT_WRITE);
            return;
        }
    sigaction(SIGSEGV, &g_previous, nullptr);  // somebody else's
}
}  // namespace

void revoke(size_t first, size_t end, bool readable, int stream, uint64_t epoch) {
    if (!g_machine.trap) return;
    g_revoked.push_back({first / kPage * kPage, round_up(end, kPage), readable ? PROT_READ : PROT_NONE, stream, epoch});
    protect(g_revoked.back(), g_revoked.back().protection);
}

void restore_views(const Clock& clock) {
    std::vector<Revoked> still;
    for (const Revoked& r : g_revoked) {
        if (clock.knows(r.stream, r.epoch))
            protect(r, PROT_READ | PROT_WRITE);
        else
            still.push_back(r);
    }
    for (const Revoked& r : still) protect(r, r.protection);  // it may share pages with one that was given back
    g_revoked.swap(still);
}

void install_trap() {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &g_previous);
}

}  // namespace fakegpu
