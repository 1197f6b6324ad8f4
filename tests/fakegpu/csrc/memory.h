// Device and pinned memory: mapped twice, so that the host's view can be taken away while kernels and DMA go on.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "common.h"

namespace fakegpu {

// The bytes of a strided tensor: `rows` stretches of `row_bytes`, `stride` apart. Tensors of other shapes count as one stretch.
struct Region {
    size_t first = 0, row_bytes = 0, stride = 0, rows = 1;
    size_t end() const { return first + (rows - 1) * stride + row_bytes; }
};
bool overlap(const Region& a, const Region& b);
bool covers(const Region& outer, const Region& inner);

struct Access {
    Region region;
    bool write;
    int stream;
    uint64_t epoch;
    std::string op;
};

struct Block {
    char* at;
    size_t n_bytes;
    int stream;  // whose allocator gave it; -1: pinned
    bool pinned;
    bool of_graph;                        // made while a stream was captured: the graph's for ever, as it is used by every replay
    std::set<int> used_by;                // other streams (record_stream, DMA)
    std::map<int, uint64_t> reuse_after;  // once freed: what these streams had been given by then
    std::vector<Access> accesses;  // that later ones may race with
};

// Never unmapped; blocks are split off its end and reused whole, last freed first: the most hostile order that is legal.
class Arena {
public:
    void open(size_t n_bytes, bool host_may_touch);
    bool owns(const void* p) const { return view_ && p >= view_ && p < view_ + capacity_; }
    char* shadow(const void* p) const { return shadow_ + (static_cast<const char*>(p) - view_); }
    Block* find(const void* p);
    // Null: no room, or past `limit_bytes`.
    Block* take(size_t n_bytes, int stream, bool pinned);
    void give_back(Block* block);
    size_t live() const { return live_; }
    size_t peak() const { return peak_; }
    size_t reserved() const { return used_; }
    size_t capacity() const { return capacity_; }
    void reset_peak() { peak_ = live_; }
    void forget_free() { free_.clear(); }
    size_t limit_bytes = ~size_t{0};

private:
    void collect();
    char *view_ = nullptr, *shadow_ = nullptr;
    size_t capacity_ = 0, used_ = 0, live_ = 0, peak_ = 0;
    std::map<std::pair<int, size_t>, std::vector<Block*>> free_;
    std::vector<Block*> waiting_;
    std::map<const char*, Block*> blocks_;
};

extern Arena g_device_memory[kMaxDevices];
extern Arena g_pinned_memory;

Block* find_block(const void* p);
// Where kernels and DMA find what the host calls p.
char* shadow(const void* p);

// What the host must not do with pinned memory until it has synchronised with (stream, epoch).
void revoke(size_t first, size_t end, bool readable, int stream, uint64_t epoch);
// The host has synchronised with all that `clock` knows.
void restore_views(const Clock& clock);
void install_trap();

void violation(const char* format, ...) __attribute__((format(printf, 1, 2)));
int violations();
const char* violation_text(int i);
void clear_violations();

}  // namespace fakegpu
