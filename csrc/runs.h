// Runs of zeros as sequences of zstd (RFC 8878, section 3.1.1.3.2): some literals, of which the last one, a zero, is
// repeated. A plane of zeros with other bytes in between takes a bit a byte and more as Huffman codes alone.
#ifndef FASTCKPT_RUNS_H
#define FASTCKPT_RUNS_H

#include "kernels.h"

namespace fastckpt {

// The sequences section of a block, with its count. literals + match of all runs: at most kBlock. Returns its bytes,
// kNoRoom if there are more than `room`. runs: 1 to kMaxRuns. scratch: as huffman_encode's.
size_t write_runs(const Run* runs, size_t n_runs, u8* out, size_t room, u8* scratch);

// A sequences section of `n_bytes`, and its literals, with kSlack readable behind them -> `out`, which has room for n
// and kSlack. Returns how many bytes that makes; 0 if it is no such section: others may use further offsets.
size_t read_runs(const u8* section, size_t n_bytes, u8* scratch, const u8* literals, size_t n_literals, u8* out,
                 size_t n);

}  // namespace fastckpt

#endif
