// The kernel of cuda/fingerprint.cuh under the grid emulator against fastckpt_fingerprint, on buffers without a byte to
// spare: built with sanitizers, by `make fingerprint-emulation`.
#include "grid_emulator.h"

#include "../cuda/fingerprint.cuh"
#include "../fastckpt.h"

namespace {

using fingerprint::Chunk;
using fingerprint::word;

struct Content {
    std::unique_ptr<unsigned char[]> memory;
    Chunk chunk;
};

// n bytes that end where their memory ends, and begin `shift` bytes after a multiple of 16.
Content content(size_t n_bytes, unsigned shift, std::mt19937_64& random) {
    Content made{std::unique_ptr<unsigned char[]>(new unsigned char[n_bytes + shift]), {}};
    for (size_t i = 0; i < n_bytes + shift; ++i) made.memory[i] = static_cast<unsigned char>(random());
    made.chunk = {reinterpret_cast<word>(made.memory.get() + shift), n_bytes};
    return made;
}

word segments_of(word n_bytes) {
    const word n_words = n_bytes / 8, found = (n_words + fingerprint::kSegmentWords - 1) / fingerprint::kSegmentWords;
    return found ? found : 1;
}

void check(const std::vector<size_t>& sizes, unsigned shift, unsigned long long seed) {
    std::mt19937_64 random(seed);
    const uint64_t keys[2] = {random(), random()};
    std::vector<Content> contents;
    std::vector<Chunk> chunks;
    word segments = 1;
    for (const size_t n_bytes : sizes) {
        contents.push_back(content(n_bytes, shift, random));
        chunks.push_back(contents.back().chunk);
        segments = std::max(segments, segments_of(n_bytes));
    }
    std::vector<word> sums(2 * chunks.size());
    grid_emulator::launch(fingerprint::fastckpt_fingerprint_kernel, static_cast<unsigned>(segments * chunks.size()),
                          fingerprint::kThreads, seed, chunks.data(), sums.data(), segments, word{keys[0]},
                          word{keys[1]});
    for (size_t i = 0; i < chunks.size(); ++i) {
        uint64_t expected[2];
        const void* const data = reinterpret_cast<const void*>(chunks[i].address);
        if (fastckpt_fingerprint(data, sizes[i], keys, expected) || expected[0] != sums[2 * i] ||
            expected[1] != sums[2 * i + 1]) {
            std::fprintf(stderr, "%zu bytes, shift %u, seed %llu: other sums than the CPU's\n", sizes[i], shift, seed);
            std::exit(1);
        }
    }
}

}  // namespace

int main() {
    const size_t segment = 8 * fingerprint::kSegmentWords;
    for (const unsigned shift : {0u, 8u, 2u}) {
        check({0, 1, 7, 8, 9, 16, 24, 4095, 4096, 4104}, shift, shift + 1);
        check({segment - 8, segment, segment + 8, segment + 9, 3, 2 * segment + 24}, shift, shift + 2);
    }
    std::puts("the kernel gives the CPU's fingerprints");
}
