// Tests of the codec through fastckpt.h alone.
//
//     driver vectors DIR OUT          what make_vectors.py has written into DIR; frames go to OUT for its check
//     driver random [SEED [LARGE]]    round trips of many lengths, equal for all instruction sets; LARGE: how many are
//                                     longer than a stripe
//     driver hostile [SEED [ROUNDS]]  damaged frames and streams in buffers without a byte to spare: for sanitizers
//     driver arguments                what the interface refuses
//     driver seeds DIR                DIR/decode and DIR/stream: first inputs of the fuzzers
//
// Without arguments: arguments, random and hostile. Exits with 1 after the first thing that is wrong.
#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "../fastckpt.h"

#ifdef NDEBUG
#error "the asserts about slack are to be tried here"
#endif

namespace {

using Bytes = std::vector<uint8_t>;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fputs("driver: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputs("\n", stderr);
    std::exit(1);
}

struct Random {  // splitmix64
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        return z ^ z >> 31;
    }
    size_t below(size_t n) { return static_cast<size_t>(next() % n); }
    bool one_in(size_t n) { return below(n) == 0; }
    double uniform() { return static_cast<double>(next() >> 11) / 9007199254740992.0; }
};

// Memory that ends exactly behind its last byte and begins at any address, so that an overrun is seen and alignment
// cannot be relied on.
class Exact {
public:
    explicit Exact(size_t n, unsigned shift = 0)
        : memory_(static_cast<uint8_t*>(std::malloc(n + shift + (n + shift == 0)))), shift_(shift), n_(n) {
        if (!memory_) fail("out of memory");
    }
    Exact(const Bytes& from, unsigned shift) : Exact(from.size(), shift) {
        if (n_) std::memcpy(data(), from.data(), n_);
    }
    uint8_t* data() { return memory_.get() + shift_; }
    Bytes bytes(size_t n) { return Bytes(data(), data() + n); }

private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<uint8_t, Free> memory_;
    unsigned shift_;
    size_t n_;
};

// A context in memory that held `fill` before.
class Context {
public:
    explicit Context(int fill) : memory_(std::aligned_alloc(64, (fastckpt_context_bytes() + 63) / 64 * 64)) {
        if (!memory_) fail("out of memory");
        std::memset(memory_, fill, fastckpt_context_bytes());
        it_ = fastckpt_context_init(memory_);
    }
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;
    ~Context() { std::free(memory_); }
    operator fastckpt_context*() const { return it_; }

private:
    void* memory_;
    fastckpt_context* it_;
};

struct Way {
    unsigned transform, w, pack_bits;
    bool delta() const { return transform == FASTCKPT_SUB || transform == FASTCKPT_SUBPACK; }
    std::string name() const {
        static const char* const names[] = {"", "RAW", "CONST", "ROT", "ROTU", "SUB", "SUBPACK"};
        return std::string(names[transform]) + (pack_bits ? std::to_string(pack_bits) : "") + "/" + std::to_string(w);
    }
};

std::vector<Way> all_ways() {
    std::vector<Way> ways;
    for (unsigned w : {2u, 4u, 8u}) {
        for (unsigned t : {FASTCKPT_ROT, FASTCKPT_ROTU, FASTCKPT_SUB}) ways.push_back({t, w, 0});
        for (unsigned p : {1u, 2u, 4u, 8u}) ways.push_back({FASTCKPT_SUBPACK, w, p});
    }
    return ways;
}

std::vector<std::string> all_isas() {
    std::vector<std::string> names;
    const std::string list = fastckpt_isas();
    for (size_t at = 0; at < list.size();) {
        const size_t end = std::min(list.find(' ', at), list.size());
        names.push_back(list.substr(at, end - at));
        at = end + 1;
    }
    if (names.empty() || names.back() != "scalar") fail("instruction sets: \"%s\"", list.c_str());
    return names;
}

void use(const std::string& isa) {
    if (fastckpt_use_isa(isa.c_str()) != FASTCKPT_OK || isa != fastckpt_isa()) fail("cannot use %s", isa.c_str());
}

// ---- the definition, lane by lane (docs/format.md, sections 4.3 and 4.4) ----

uint64_t lane_at(const Bytes& data, size_t i, unsigned w) {
    uint64_t x = 0;
    for (unsigned k = 0; k < w; ++k) x |= uint64_t{data[i * w + k]} << (8 * k);
    return x;
}

uint64_t mapped(const Way& way, const Bytes& raw, const Bytes& base, size_t i) {
    const unsigned b = 8 * way.w;
    const uint64_t mask = ~uint64_t{0} >> (64 - b), top = uint64_t{1} << (b - 1), x = lane_at(raw, i, way.w);
    if (!way.delta()) return ((x << 1) | (x >> (b - 1))) & mask;
    const auto order = [&](uint64_t v) { return v & top ? ~v & mask : v | top; };
    const uint64_t d = (order(x) - order(lane_at(base, i, way.w))) & mask;
    return ((d << 1) ^ (d & top ? mask : 0)) & mask;
}

void put_bits(Bytes& out, size_t first, size_t at, unsigned value, unsigned bits) {
    for (unsigned k = 0; k < bits; ++k, ++at) {
        if (first + at / 8 == out.size()) out.push_back(0);
        out[first + at / 8] = static_cast<uint8_t>(out[first + at / 8] | (value >> k & 1) << (at % 8));
    }
}

Bytes expected_stream(const Way& way, const Bytes& raw, const Bytes& base) {
    const size_t lanes = raw.size() / way.w;
    Bytes out;
    if (way.transform == FASTCKPT_SUBPACK) {
        const uint64_t esc = (1u << way.pack_bits) - 1;
        std::vector<uint64_t> escapes;
        out.resize(4);
        for (size_t i = 0; i < lanes; ++i) {
            const uint64_t z = mapped(way, raw, base, i);
            put_bits(out, 4, i * way.pack_bits, static_cast<unsigned>(std::min(z, esc)), way.pack_bits);
            if (z >= esc) escapes.push_back(z - esc);
        }
        for (unsigned k = 0; k < 4; ++k) out[k] = static_cast<uint8_t>(escapes.size() >> (8 * k));
        for (unsigned k = way.w; k-- > 0;)
            for (uint64_t x : escapes) out.push_back(static_cast<uint8_t>(x >> (8 * k)));
        return out;
    }
    for (size_t from = 0; from < lanes; from += FASTCKPT_STRIPE_LANES) {
        const size_t to = std::min<size_t>(lanes, from + FASTCKPT_STRIPE_LANES);
        for (unsigned k = way.w; k-- > 0;) {
            const size_t first = out.size();
            for (size_t i = from; i < to; ++i) {
                const auto byte = static_cast<uint8_t>(mapped(way, raw, base, i) >> (8 * k));
                if (k == 0 && way.transform == FASTCKPT_ROTU)
                    put_bits(out, first, 7 * (i - from), byte >> 1, 7);
                else
                    out.push_back(byte);
            }
        }
    }
    return out;
}

// ---- data ----

constexpr unsigned kKinds = 8;

// Lanes of one of kKinds sorts.
Bytes some_lanes(Random& r, unsigned kind, size_t lanes, unsigned w) {
    Bytes out(lanes * w);
    const uint64_t one = r.next(), other = r.next();
    const size_t rare = r.below(lanes), rare_end = rare + 1 + r.below(6);
    for (size_t i = 0; i < lanes; ++i) {
        uint64_t x = 0;
        switch (kind) {
            case 0: {  // floats: a triangle-like distribution of exponents, noise below it
                double v = r.uniform() + r.uniform() + r.uniform() - 1.5;
                v *= 0.01;
                const auto f = static_cast<float>(v);
                uint32_t bits;
                std::memcpy(&bits, &f, 4);
                if (w == 8)
                    std::memcpy(&x, &v, 8);
                else
                    x = w == 4 ? bits : bits >> 16;
                break;
            }
            case 1: x = r.next(); break;
            case 2: x = one; break;
            case 3: x = r.one_in(700) ? one : other; break;
            case 4: x = i * 0x0101; break;
            case 5:  // bytes of geometric frequency: deep codes
                for (unsigned k = 0; k < w; ++k)
                    x = x << 8 | static_cast<unsigned>(__builtin_clzll(r.next() | 1)) * (k + 1);
                break;
            case 6:  // bytes that are far apart, and neighbours among them that a sample misses
                x = (i >= rare && i < rare_end ? 0x7f7f7f7f7f7f7f7full
                     : r.one_in(2)             ? 0x1010101010101010ull
                                               : 0x6060606060606060ull) ^
                    r.below(200);
                break;
            default: x = r.one_in(2) ? one & 0xff00ff00ff00ff00ull : r.below(16); break;
        }
        for (unsigned k = 0; k < w; ++k) out[i * w + k] = static_cast<uint8_t>(x >> (8 * k));
    }
    return out;
}

// What the transform can take: raw bytes, and a base for those that have one.
void some_chunk(Random& r, const Way& way, unsigned kind, size_t lanes, Bytes& raw, Bytes& base) {
    raw = some_lanes(r, kind, lanes, way.w);
    base.clear();
    if (way.transform == FASTCKPT_ROTU)
        for (size_t i = 0; i < lanes; ++i) raw[i * way.w + way.w - 1] &= 0x7f;
    if (!way.delta()) return;
    base = raw;
    const size_t far = r.one_in(4) ? 1 : 5 + r.below(500),
                 spread = r.one_in(3) ? 1 : size_t{1} << r.below(10);  // 1: most lanes equal their base
    for (size_t i = 0; i < lanes; ++i) {
        uint64_t x = lane_at(base, i, way.w);
        x = r.one_in(far) ? r.next() : x + r.below(spread) - spread / 2;
        for (unsigned k = 0; k < way.w; ++k) raw[i * way.w + k] = static_cast<uint8_t>(x >> (8 * k));
    }
}

size_t stream_room(const Way& way, size_t n) { return way.transform == FASTCKPT_SUBPACK ? 4 + n / way.w + n : n; }

unsigned some_shift(Random& r) { return static_cast<unsigned>(r.below(2) ? r.below(64) : 0); }

// ---- one chunk, all ways round ----

struct Case {
    Way way;
    Bytes raw, base;
    const char* isa;

    [[noreturn]] void wrong(const char* what, int status = 0) const {
        fail("%s of %zu lanes, %s: %s (status %d)", way.name().c_str(), raw.size() / way.w, isa, what, status);
    }
};

Bytes split(fastckpt_context* context, const Case& c, Random& r) {
    Exact raw(c.raw, some_shift(r)), base(c.base, some_shift(r)),
        stream(stream_room(c.way, c.raw.size()), some_shift(r));
    size_t n = 0;
    const int status =
        fastckpt_split(context, raw.data(), c.way.delta() ? base.data() : nullptr, c.raw.size(), c.way.transform,
                       c.way.w, c.way.pack_bits, stream.data(), stream_room(c.way, c.raw.size()), &n);
    if (status) c.wrong("split", status);
    return stream.bytes(n);
}

// The base's own memory instead of another: the same, or the base's bytes are still there.
template <class Call>
void check_in_place(const Case& c, const char* what, int status, const Bytes& found, Random& r, const Call& call) {
    if (!c.way.delta()) return;
    Exact both(c.base, some_shift(r));
    if (call(both.data()) != status) c.wrong(what, status);
    if (both.bytes(c.base.size()) != (status == FASTCKPT_OK ? found : c.base)) c.wrong(what, status);
}

// Status; the raw bytes if it is FASTCKPT_OK.
int merge(fastckpt_context* context, const Case& c, const Bytes& stream, Bytes& found, Random& r) {
    Exact from(stream, some_shift(r)), base(c.base, some_shift(r)), raw(c.raw.size(), some_shift(r));
    const int status = fastckpt_merge(context, from.data(), stream.size(), c.way.delta() ? base.data() : nullptr,
                                      c.raw.size(), c.way.transform, c.way.w, c.way.pack_bits, raw.data());
    if (status == FASTCKPT_OK) found = raw.bytes(c.raw.size());
    check_in_place(c, "merge in place", status, found, r, [&](uint8_t* both) {
        return fastckpt_merge(context, from.data(), stream.size(), both, c.raw.size(), c.way.transform, c.way.w,
                              c.way.pack_bits, both);
    });
    return status;
}

int encode(fastckpt_context* context, const Case& c, size_t capacity, Bytes& frame, fastckpt_encoded& result,
           Random& r) {
    Exact raw(c.raw, some_shift(r)), base(c.base, some_shift(r)), stored(capacity, some_shift(r));
    const int status = fastckpt_encode(context, raw.data(), c.way.delta() ? base.data() : nullptr, c.raw.size(),
                                       c.way.transform, c.way.w, c.way.pack_bits, stored.data(), capacity, &result);
    if (status) return status;
    if (result.stored_bytes > capacity) c.wrong("encode has written more than there is room for");
    frame = stored.bytes(result.stored_bytes);
    return FASTCKPT_OK;
}

int decode(fastckpt_context* context, const Case& c, const Bytes& frame, Bytes& found, uint8_t digest[16], Random& r) {
    Exact from(frame, some_shift(r)), base(c.base, some_shift(r)), raw(c.raw.size(), some_shift(r));
    const int status = fastckpt_decode(context, from.data(), frame.size(), c.way.delta() ? base.data() : nullptr,
                                       c.raw.size(), c.way.transform, c.way.w, c.way.pack_bits, raw.data(), digest);
    if (status == FASTCKPT_OK) found = raw.bytes(c.raw.size());
    const bool digested = r.one_in(2);
    check_in_place(c, "decode in place", status, found, r, [&](uint8_t* both) {
        uint8_t again[16];
        const int its = fastckpt_decode(context, from.data(), frame.size(), both, c.raw.size(), c.way.transform,
                                        c.way.w, c.way.pack_bits, both, digested ? again : nullptr);
        if (digested && its == FASTCKPT_OK && std::memcmp(again, digest, 16)) c.wrong("digest by decode in place");
        return its;
    });
    return status;
}

void digest_of(const Bytes& raw, uint8_t digest[16]) {
    std::memset(digest, 0, 16);
    if (raw.size() >= FASTCKPT_MIN_DIGEST_BYTES && fastckpt_xxh3_128(raw.data(), raw.size(), digest))
        fail("xxh3_128 of %zu bytes", raw.size());
}

// A base, a delta and what is made of that, by rows of read_chunks that are read to one place; then without the base.
void read_chain(fastckpt_context* context, const Case& c, const Bytes& frame, const fastckpt_encoded& encoded,
                Random& r) {
    const size_t n = c.raw.size();
    const bool in_place = r.one_in(2);
    Bytes stored = c.base;
    stored.insert(stored.end(), frame.begin(), frame.end());
    Exact from(stored, some_shift(r)), first(n, some_shift(r)), second(n, some_shift(r));
    uint8_t* const to = in_place ? first.data() : second.data();
    fastckpt_chunk rows[3] = {};
    for (fastckpt_chunk& row : rows) {
        row.raw = reinterpret_cast<uintptr_t>(to);
        row.raw_bytes = n;
        row.base = reinterpret_cast<uintptr_t>(first.data());
        row.lane_bytes = static_cast<uint8_t>(c.way.w);
        std::memcpy(row.digest, encoded.digest, sizeof row.digest);
    }
    rows[0].transform = FASTCKPT_RAW;
    rows[0].is_base = 1;
    rows[0].stored_bytes = n;
    rows[0].raw = rows[0].base;
    rows[0].crc64nvme = fastckpt_crc64nvme_portable(0, c.base.data(), n);
    rows[1].transform = static_cast<uint8_t>(c.way.transform);
    rows[1].pack_bits = static_cast<uint8_t>(c.way.pack_bits);
    rows[1].offset = n;
    rows[1].stored_bytes = frame.size();
    rows[1].crc64nvme = encoded.crc64nvme;
    rows[2].transform = FASTCKPT_REF;
    rows[2].base = rows[1].raw;
    fastckpt_outcome outcomes[3];
    const auto read = [&](int expected, int after) {
        if (fastckpt_read_chunks(context, -1, from.data(), stored.size(), nullptr, 0, rows, 3, outcomes))
            c.wrong("read_chunks is refused");
        if (outcomes[0].status != expected || outcomes[1].status != after || outcomes[2].status != after)
            c.wrong("read_chunks of a chain", outcomes[1].status);
    };
    read(FASTCKPT_OK, FASTCKPT_OK);
    if (Bytes(to, to + n) != c.raw) c.wrong("read_chunks of a chain gives other bytes");
    rows[0].crc64nvme ^= 1;
    read(FASTCKPT_DAMAGED, FASTCKPT_NO_BASE);
    rows[0].crc64nvme ^= 1;
    rows[1].digest[15] ^= 1;
    rows[2].digest[15] ^= 1;
    if (fastckpt_read_chunks(context, -1, from.data(), stored.size(), nullptr, 0, rows, 3, outcomes))
        c.wrong("read_chunks is refused");
    if (outcomes[1].status != FASTCKPT_DAMAGED || outcomes[2].status != FASTCKPT_NO_BASE)
        c.wrong("read_chunks takes another digest of a delta");
    rows[1].base = n > 1 ? rows[1].raw + 1 : 0;  // reaches into the room
    if (fastckpt_read_chunks(context, -1, from.data(), stored.size(), nullptr, 0, rows, 2, outcomes) ||
        outcomes[1].status != FASTCKPT_BAD_ARGUMENT)
        c.wrong("read_chunks takes a base that overlaps");
}

// The chunk out of a row of read_chunks: from memory and, now and then, from a file; and with less than all of it
// there.
void read_back(fastckpt_context* context, const Case& c, const Bytes& frame, const fastckpt_encoded& encoded,
               Random& r) {
    if (c.raw.size() < FASTCKPT_MIN_DIGEST_BYTES) return;
    if (c.way.delta()) return read_chain(context, c, frame, encoded, r);
    Exact from(frame, some_shift(r)), raw(c.raw.size(), some_shift(r)), scratch(FASTCKPT_MAX_RAW_BYTES);
    fastckpt_chunk chunk = {};
    chunk.stored_bytes = frame.size();
    chunk.raw = reinterpret_cast<uintptr_t>(raw.data());
    chunk.raw_bytes = c.raw.size();
    chunk.crc64nvme = encoded.crc64nvme;
    std::memcpy(chunk.digest, encoded.digest, sizeof chunk.digest);
    chunk.transform = static_cast<uint8_t>(c.way.transform);
    chunk.lane_bytes = static_cast<uint8_t>(c.way.w);
    fastckpt_outcome outcome;
    const auto read = [&](int file, size_t n_bytes) {
        std::memset(raw.data(), 0, c.raw.size());
        if (fastckpt_read_chunks(context, file, file < 0 ? from.data() : nullptr, n_bytes, scratch.data(),
                                 FASTCKPT_MAX_RAW_BYTES, &chunk, 1, &outcome))
            c.wrong("read_chunks is refused");
        return outcome.status;
    };
    if (const int status = read(-1, frame.size())) c.wrong("read_chunks", status);
    if (raw.bytes(c.raw.size()) != c.raw) c.wrong("read_chunks gives other bytes");
    if (read(-1, frame.size() - 1) != FASTCKPT_UNREAD) c.wrong("read_chunks reads what is not there");
    if (r.one_in(8)) {
        std::FILE* file = std::tmpfile();
        if (!file || std::fwrite(frame.data(), 1, frame.size(), file) != frame.size() || std::fflush(file))
            fail("no temporary file");
        if (const int status = read(fileno(file), 0)) c.wrong("read_chunks of a file", status);
        if (raw.bytes(c.raw.size()) != c.raw) c.wrong("read_chunks of a file gives other bytes");
        chunk.offset = 1;
        if (read(fileno(file), 0) != FASTCKPT_UNREAD) c.wrong("read_chunks reads past the end of a file");
        chunk.offset = 0;
        std::fclose(file);
    }
    chunk.digest[0] ^= 1;
    if (read(-1, frame.size()) != FASTCKPT_DAMAGED) c.wrong("read_chunks takes another digest");
}

// Everything of one chunk with the instruction set in use. `stream`: what it must be.
Bytes round_trip(fastckpt_context* context, const Case& c, const Bytes& stream, Random& r) {
    if (split(context, c, r) != stream) c.wrong("split gives another stream");
    Bytes found;
    if (const int status = merge(context, c, stream, found, r)) c.wrong("merge", status);
    if (found != c.raw) c.wrong("merge gives other bytes");
    Bytes frame;
    fastckpt_encoded result;
    if (const int status = encode(context, c, fastckpt_encode_bound(c.raw.size()), frame, result, r))
        c.wrong("encode", status);
    if (result.crc64nvme != fastckpt_crc64nvme_portable(0, frame.data(), frame.size())) c.wrong("crc of the frame");
    uint8_t expected[16], digest[16];
    digest_of(c.raw, expected);
    if (std::memcmp(result.digest, expected, 16)) c.wrong("digest by encode");
    found.clear();
    if (const int status = decode(context, c, frame, found, digest, r)) c.wrong("decode", status);
    if (found != c.raw) c.wrong("decode gives other bytes");
    if (std::memcmp(digest, expected, 16)) c.wrong("digest by decode");
    read_back(context, c, frame, result, r);
    return frame;
}

// ---- vectors ----

Bytes read_file(const std::string& path) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) fail("cannot open %s", path.c_str());
    Bytes out;
    uint8_t piece[65536];
    for (size_t n; (n = std::fread(piece, 1, sizeof piece, file)) > 0;) out.insert(out.end(), piece, piece + n);
    std::fclose(file);
    return out;
}

void write_file(const std::string& path, const Bytes& data) {
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (!file || std::fwrite(data.data(), 1, data.size(), file) != data.size() || std::fclose(file))
        fail("cannot write %s", path.c_str());
}

void make_folder(const std::string& path) {
    mkdir(path.c_str(), 0777);
    struct stat found;
    if (stat(path.c_str(), &found) || !S_ISDIR(found.st_mode)) fail("cannot make %s", path.c_str());
}

int vectors(const std::string& folder, const std::string& out) {
    DIR* listing = opendir(folder.c_str());
    if (!listing) fail("cannot list %s", folder.c_str());
    std::vector<std::string> names;
    while (const dirent* entry = readdir(listing)) {
        const std::string name = entry->d_name;
        if (name.size() > 4 && name.substr(name.size() - 4) == ".vec") names.push_back(name.substr(0, name.size() - 4));
    }
    closedir(listing);
    std::sort(names.begin(), names.end());
    if (names.empty()) fail("no vectors in %s", folder.c_str());
    make_folder(out);
    Random r{1};
    size_t stock_frames = 0;
    Context context(0xA5);
    for (const std::string& name : names) {
        const Bytes file = read_file(folder + "/" + name + ".vec");
        constexpr size_t kHead = 72;
        if (file.size() < kHead || std::memcmp(file.data(), "FCVECT01", 8)) fail("%s is no vector", name.c_str());
        const auto number = [&](size_t at, unsigned n) {
            uint64_t x = 0;
            for (unsigned k = 0; k < n; ++k) x |= uint64_t{file[at + k]} << (8 * k);
            return x;
        };
        const Way way{static_cast<unsigned>(number(8, 4)), static_cast<unsigned>(number(12, 4)),
                      static_cast<unsigned>(number(16, 4))};
        const size_t n = number(24, 8), n_base = number(20, 4) ? n : 0, n_stream = number(32, 8),
                     n_stock = number(40, 8);
        if (file.size() != kHead + n + n_base + n_stream + n_stock) fail("%s: %zu bytes", name.c_str(), file.size());
        auto at = file.begin() + kHead;
        const auto take = [&](size_t m) {
            at += static_cast<std::ptrdiff_t>(m);
            return Bytes(at - static_cast<std::ptrdiff_t>(m), at);
        };
        Case c{way, take(n), take(n_base), ""};
        const Bytes stream = take(n_stream), stock = take(n_stock);
        Bytes frame;
        for (const std::string& isa : all_isas()) {
            use(isa);
            c.isa = isa.c_str();
            if (n >= FASTCKPT_MIN_DIGEST_BYTES) {
                uint8_t digest[16];
                digest_of(c.raw, digest);
                if (std::memcmp(digest, file.data() + 48, 16)) c.wrong("digest");
            }
            if (fastckpt_crc64nvme(0, c.raw.data(), n) != number(64, 8)) c.wrong("crc64nvme");
            if (fastckpt_crc64nvme_portable(0, c.raw.data(), n) != number(64, 8)) c.wrong("crc64nvme, portable");
            const size_t part = r.below(n + 1);
            if (fastckpt_crc64nvme(fastckpt_crc64nvme(0, c.raw.data(), part), c.raw.data() + part, n - part) !=
                number(64, 8))
                c.wrong("crc64nvme in two parts");
            if (fastckpt_crc64nvme_combine(fastckpt_crc64nvme(0, c.raw.data(), part),
                                           fastckpt_crc64nvme(0, c.raw.data() + part, n - part),
                                           n - part) != number(64, 8))
                c.wrong("crc64nvme of two parts, combined");
            const Bytes made = round_trip(context, c, stream, r);
            if (!frame.empty() && made != frame) c.wrong("another frame than by the instruction set before");
            frame = made;
            // A stock encoder's frame: either read rightly or left to a stock decoder.
            Bytes found;
            uint8_t digest[16];
            const int status = decode(context, c, stock, found, digest, r);
            if (status != FASTCKPT_OK && status != FASTCKPT_FOREIGN) c.wrong("decode of a stock frame", status);
            if (status == FASTCKPT_OK && found != c.raw) c.wrong("a stock frame gives other bytes");
            stock_frames += status == FASTCKPT_OK;
        }
        write_file(out + "/" + name + ".zst", frame);
        char crc[17];
        std::snprintf(crc, sizeof crc, "%016llx",
                      static_cast<unsigned long long>(fastckpt_crc64nvme_portable(0, frame.data(), frame.size())));
        write_file(out + "/" + name + ".crc", Bytes(crc, crc + 16));
    }
    std::printf("vectors: %zu, for each of: %s; stock frames that are read as well: %zu\n", names.size(),
                fastckpt_isas(), stock_frames);
    return 0;
}

// ---- random ----

int random_tests(uint64_t seed, size_t large) {
    Random r{seed};
    std::vector<size_t> lengths = {1, 2, 7, 8, 9, 63, 64, 65};
    for (size_t n = 1000; n <= 1030; ++n) lengths.push_back(n);
    for (size_t k = 0; k < 6; ++k) lengths.push_back(1 + r.below(40000));
    const std::vector<size_t> long_ones = {131071, 131072, 131073, 262143, 262145, 300000};
    const std::vector<std::string> isas = all_isas();
    const std::vector<Way> ways = all_ways();
    size_t n_cases = 0;
    Context context(0xFF);
    const auto one = [&](const Way& way, unsigned kind, size_t lanes) {
        Case c{way, {}, {}, ""};
        some_chunk(r, way, kind, lanes, c.raw, c.base);
        const Bytes stream = expected_stream(way, c.raw, c.base);
        Bytes frame;
        for (const std::string& isa : isas) {
            use(isa);
            c.isa = isa.c_str();
            const Bytes made = round_trip(context, c, stream, r);
            if (!frame.empty() && made != frame) c.wrong("another frame than by the instruction set before");
            frame = made;
        }
        ++n_cases;
    };
    for (const Way& way : ways)
        for (size_t lanes : lengths) one(way, static_cast<unsigned>(r.below(kKinds)), lanes);
    const size_t first = r.below(ways.size());
    for (size_t k = 0; k < large; ++k) {
        const Way& way = ways[(first + k) % ways.size()];
        const size_t most = FASTCKPT_MAX_RAW_BYTES / way.w;
        one(way, k % 2 ? static_cast<unsigned>(r.below(kKinds)) : 0,
            std::min(most, k < long_ones.size() ? long_ones[k] : 100000 + r.below(200001)));
    }
    // One to five neighbours that a sample misses, of a value that its code lacks: an encoder must notice each number
    // of them.
    for (size_t k = 0; k < 100; ++k) {
        Case c{{FASTCKPT_ROT, 2, 0}, some_lanes(r, 1, 16384, 2), {}, ""};
        const size_t rare = r.below(16384 - 5);
        for (size_t i = 0; i < 16384; ++i)
            c.raw[2 * i + 1] = i >= rare && i <= rare + k % 5 ? 0x7f : r.one_in(2) ? 0x10 : 0x60;
        const Bytes stream = expected_stream(c.way, c.raw, c.base);
        for (const std::string& isa : isas) {
            use(isa);
            c.isa = isa.c_str();
            round_trip(context, c, stream, r);
        }
    }
    // Each way of computing a digest and a crc, for each length.
    Bytes data = some_lanes(r, 1, 600, 8);
    for (size_t n = 0; n <= data.size(); n += 1 + r.below(3)) {
        uint8_t digest[16], other[16];
        for (size_t i = 0; i < isas.size(); ++i) {
            use(isas[i]);
            Exact exact(Bytes(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(n)), some_shift(r));
            if (fastckpt_crc64nvme(n, exact.data(), n) != fastckpt_crc64nvme_portable(n, exact.data(), n))
                fail("crc of %zu bytes, %s", n, isas[i].c_str());
            const int status = fastckpt_xxh3_128(exact.data(), n, i ? other : digest);
            if (status != (n < FASTCKPT_MIN_DIGEST_BYTES ? FASTCKPT_BAD_LENGTH : FASTCKPT_OK))
                fail("xxh3_128 of %zu bytes: status %d", n, status);
            if (!status && i && std::memcmp(digest, other, 16)) fail("xxh3_128 of %zu bytes, %s", n, isas[i].c_str());
        }
    }
    std::printf("random: %zu chunks, for each of: %s\n", n_cases, fastckpt_isas());
    return 0;
}

// ---- hostile ----

Bytes damaged(Random& r, const Bytes& good, const Bytes& other) {
    Bytes bad = good;
    for (size_t changes = 1 + (r.one_in(2) ? r.below(4) : 0); changes; --changes) {
        // The heads of frame, blocks, tables and streams are near the front.
        const auto place = [&](size_t n) {
            return n ? r.one_in(2) ? r.below(std::min<size_t>(n, 64)) : r.below(n) : 0;
        };
        switch (r.below(8)) {
            case 0:
            case 1:
            case 2:
                if (!bad.empty()) bad[place(bad.size())] ^= static_cast<uint8_t>(1u << r.below(8));
                break;
            case 3:
                if (!bad.empty()) bad[place(bad.size())] = static_cast<uint8_t>(r.one_in(3) ? 0xff : r.next());
                break;
            case 4:
                bad.resize(r.one_in(2) ? bad.size() - std::min(bad.size(), 1 + r.below(20)) : r.below(bad.size() + 1));
                break;
            case 5:
                for (size_t n = 1 + r.below(80); n; --n)
                    bad.push_back(static_cast<uint8_t>(r.one_in(2) ? 0 : r.next()));
                break;
            case 6: {  // the front of one, the back of the other
                const size_t here = place(bad.size()),
                             there = r.one_in(2) ? std::min(here, other.size()) : place(other.size());
                bad.resize(here);
                bad.insert(bad.end(), other.begin() + static_cast<std::ptrdiff_t>(there), other.end());
                break;
            }
            default:
                if (bad.size() > 16) {  // a stretch of it elsewhere
                    const size_t n = 1 + r.below(16), from = r.below(bad.size() - n), to = place(bad.size() - n);
                    std::memmove(bad.data() + to, bad.data() + from, n);
                }
        }
    }
    return bad;
}

int hostile(uint64_t seed, size_t rounds) {
    Random r{seed};
    const std::vector<std::string> isas = all_isas();
    const std::vector<Way> ways = all_ways();
    size_t tries = 0, accepted = 0, capacities = 0;
    Context zeros(0), ones(0xFF);
    for (size_t round = 0; round < rounds; ++round) {
        const Way way = ways[r.below(ways.size())];
        const size_t lanes = r.one_in(40) ? 131000 + r.below(9000) : 1 + r.below(r.one_in(3) ? 300 : 6000);
        Case c{way, {}, {}, ""}, other{way, {}, {}, ""};
        some_chunk(r, way, static_cast<unsigned>(r.below(kKinds)), lanes, c.raw, c.base);
        some_chunk(r, way, static_cast<unsigned>(r.below(kKinds)), lanes, other.raw, other.base);
        const std::string& isa = isas[r.below(isas.size())];
        use(isa);
        c.isa = other.isa = isa.c_str();
        Bytes frame, other_frame;
        fastckpt_encoded result;
        const size_t bound = fastckpt_encode_bound(c.raw.size());
        if (encode(zeros, c, bound, frame, result, r) || encode(zeros, other, bound, other_frame, result, r))
            c.wrong("encode");
        // Less room: either the same frame or FASTCKPT_NO_ROOM.
        for (size_t k = 0; k < 3; ++k, ++capacities) {
            const size_t capacity = k == 0 ? frame.size() : k == 1 ? frame.size() - 1 : r.below(frame.size());
            Bytes small;
            const int status = encode(ones, c, capacity, small, result, r);
            if (status != (k ? FASTCKPT_NO_ROOM : FASTCKPT_OK))
                c.wrong(k ? "encode with too little room" : "encode with just enough room", status);
            if (!k && small != frame) c.wrong("just enough room gives another frame");
        }
        const Bytes stream = split(zeros, c, r), other_stream = split(zeros, other, r);
        const size_t times = lanes > 10000 ? 3 : 20;
        for (size_t k = 0; k < times; ++k, ++tries) {
            const bool framed = k % 3 != 0;
            const Bytes bad = framed ? damaged(r, frame, other_frame) : damaged(r, stream, other_stream);
            // What a context held before must not matter, nor which instructions are used.
            Bytes found[2];
            uint8_t digest[2][16] = {};
            int status[2];
            for (unsigned i = 0; i < 2; ++i) {
                if (i) use(isas[r.below(isas.size())]);
                fastckpt_context* context = i ? ones : zeros;
                status[i] =
                    framed ? decode(context, c, bad, found[i], digest[i], r) : merge(context, c, bad, found[i], r);
            }
            use(isa);
            const char* what = framed ? "decode of damaged bytes" : "merge of damaged bytes";
            if (status[0] != FASTCKPT_OK && status[0] != FASTCKPT_FOREIGN) c.wrong(what, status[0]);
            if (status[0] != status[1] || found[0] != found[1] || std::memcmp(digest[0], digest[1], 16))
                c.wrong("differs by context or instruction set");
            if (status[0]) continue;
            ++accepted;
            Case again{way, found[0], c.base, c.isa};
            if (framed) {
                uint8_t expected[16];
                digest_of(again.raw, expected);
                if (std::memcmp(digest[0], expected, 16)) c.wrong("digest of what was accepted");
            }
            round_trip(zeros, again,
                       lanes > 10000 ? split(ones, again, r) : expected_stream(way, again.raw, again.base), r);
        }
    }
    std::printf("hostile: %zu damaged inputs (%zu still mean something), %zu small capacities\n", tries, accepted,
                capacities);
    return 0;
}

// ---- arguments ----

// Each width, count, length, capacity and pointer in turn is what no caller should pass; the buffers end at their last
// byte. Whatever the call answers, it must not touch memory that is not its own, which sanitizers see.
void wild_arguments(Random& r) {
    constexpr size_t kBytes = 240;  // whole lanes of each width
    constexpr uint64_t kWild[] = {0,
                                  1,
                                  2,
                                  3,
                                  4,
                                  5,
                                  7,
                                  8,
                                  9,
                                  16,
                                  63,
                                  64,
                                  65,
                                  100,
                                  127,
                                  128,
                                  255,
                                  65535,
                                  65536,
                                  65537,
                                  1u << 31,
                                  (1u << 31) + 2,
                                  0xffffffff,
                                  uint64_t{1} << 32,
                                  uint64_t{1} << 62,
                                  uint64_t{1} << 63,
                                  (uint64_t{1} << 63) - 1,
                                  ~uint64_t{0},
                                  ~uint64_t{0} - 7,
                                  ~uint64_t{0} - 4095};
    Context context(0xA5);
    Exact raw(some_lanes(r, 1, kBytes, 1), 1), base(some_lanes(r, 1, kBytes, 1), 3), out(kBytes, 5);
    fastckpt_encoded result;
    fastckpt_estimate estimate;
    uint8_t digest[16];
    size_t size = 0;
    int found = 0;
    const auto refused = [](int status, const char* what, uint64_t x) {
        if (status < FASTCKPT_BAD_LANE || status > FASTCKPT_BAD_ARGUMENT)
            fail("%s, %#llx: status %d", what, static_cast<unsigned long long>(x), status);
    };
    for (const uint64_t x : kWild) {
        const auto number = static_cast<unsigned>(x);
        for (unsigned w : {1u, 2u, 4u, 8u})
            if (number != w) {
                const int status = fastckpt_is_constant(raw.data(), kBytes, number, &found);
                if (number != 1 && number != 2 && number != 4 && number != 8)
                    refused(status, "is_constant of lanes", x);
            }
        if (number != 2 && number != 4 && number != 8)
            refused(fastckpt_sample(context, raw.data(), base.data(), kBytes, number, &estimate), "sample of lanes", x);
        for (unsigned transform : {FASTCKPT_ROT, FASTCKPT_ROTU, FASTCKPT_SUB, FASTCKPT_SUBPACK}) {
            if (number != 2 && number != 4 && number != 8) {
                refused(fastckpt_encode(context, raw.data(), base.data(), kBytes, transform, number, 1, out.data(),
                                        kBytes, &result),
                        "encode of lanes", x);
                refused(fastckpt_decode(context, raw.data(), kBytes, base.data(), kBytes, transform, number, 1,
                                        out.data(), digest),
                        "decode of lanes", x);
                refused(fastckpt_split(context, raw.data(), base.data(), kBytes, transform, number, 1, out.data(),
                                       kBytes, &size),
                        "split of lanes", x);
                refused(
                    fastckpt_merge(context, raw.data(), kBytes, base.data(), kBytes, transform, number, 1, out.data()),
                    "merge of lanes", x);
            }
            // Any pack bits: either known or refused.
            fastckpt_encode(context, raw.data(), base.data(), kBytes, transform, 4, number, out.data(), kBytes,
                            &result);
            fastckpt_decode(context, raw.data(), kBytes, base.data(), kBytes, transform, 4, number, out.data(), digest);
            fastckpt_split(context, raw.data(), base.data(), kBytes, transform, 4, number, out.data(), kBytes, &size);
            fastckpt_merge(context, raw.data(), kBytes, base.data(), kBytes, transform, 4, number, out.data());
            if (x > PTRDIFF_MAX) {
                const size_t n = static_cast<size_t>(x);
                refused(
                    fastckpt_encode(context, raw.data(), base.data(), kBytes, transform, 2, 1, out.data(), n, &result),
                    "encode into", x);
                refused(
                    fastckpt_decode(context, raw.data(), n, base.data(), kBytes, transform, 2, 1, out.data(), digest),
                    "decode from", x);
                refused(fastckpt_split(context, raw.data(), base.data(), kBytes, transform, 2, 1, out.data(), n, &size),
                        "split into", x);
                refused(fastckpt_merge(context, raw.data(), n, base.data(), kBytes, transform, 2, 1, out.data()),
                        "merge from", x);
                refused(
                    fastckpt_encode(context, raw.data(), base.data(), n, transform, 2, 1, out.data(), kBytes, &result),
                    "encode of bytes", x);
                refused(
                    fastckpt_decode(context, raw.data(), kBytes, base.data(), n, transform, 2, 1, out.data(), digest),
                    "decode to bytes", x);
            }
        }
        for (unsigned transform : {0u, 1u, 2u, 7u, number})
            if (transform < FASTCKPT_ROT || transform > FASTCKPT_SUBPACK)
                refused(fastckpt_split(context, raw.data(), base.data(), kBytes, transform, 2, 1, out.data(), kBytes,
                                       &size),
                        "split by transform", x);
        if (x > PTRDIFF_MAX) {
            const size_t n = static_cast<size_t>(x);
            const uint64_t at[] = {reinterpret_cast<uintptr_t>(raw.data())}, lengths[] = {x}, one[] = {1};
            uint64_t row = 0;
            refused(fastckpt_is_constant(raw.data(), n, 1, &found), "is_constant of bytes", x);
            refused(fastckpt_sample(context, raw.data(), base.data(), n, 2, &estimate), "sample of bytes", x);
            refused(fastckpt_xxh3_128(raw.data(), n, digest), "xxh3_128 of bytes", x);
            refused(fastckpt_encode(nullptr, raw.data(), nullptr, n, FASTCKPT_RAW, 1, 0, out.data(), kBytes, &result),
                    "RAW of bytes", x);
            refused(fastckpt_encode(nullptr, raw.data(), nullptr, kBytes, FASTCKPT_RAW, 1, 0, out.data(), n, &result),
                    "RAW into", x);
            refused(fastckpt_gather(at, lengths, 1, out.data(), kBytes), "gather of bytes", x);
            refused(fastckpt_gather(at, one, n, out.data(), kBytes), "gather of stretches", x);
            refused(fastckpt_gather(at, one, 1, out.data(), n), "gather into", x);
            refused(fastckpt_lines(at, lengths, 1, 0, out.data(), kBytes), "lines of bytes", x);
            refused(fastckpt_lines(at, one, n, 0, out.data(), kBytes), "lines of stretches", x);
            refused(fastckpt_lines(at, one, 1, 0, out.data(), n), "lines into", x);
            refused(fastckpt_rows(raw.data(), n, at, &row, 1), "rows of bytes", x);
            refused(fastckpt_rows(raw.data(), 0, at, &row, n), "as many rows", x);
            refused(fastckpt_cast(raw.data(), n, out.data()), "cast of lanes", x);
            refused(fastckpt_cast_equal(out.data(), raw.data(), n, &found), "cast_equal of lanes", x);
            if (fastckpt_encode_bound(n)) fail("a bound for %zu bytes", n);
            if (fastckpt_lines_bytes(lengths, 1) != SIZE_MAX || fastckpt_lines_bytes(one, n) != SIZE_MAX)
                fail("a sample of %zu bytes", n);
        }
    }
    // Sums that wrap to what there is room for: of bytes, and of a sample's, a 64th of them.
    for (const unsigned bits : {56u, 58u, 62u, 63u}) {
        const size_t n = size_t{1} << (64 - bits) << (bits < 60 ? 6 : 0);
        const std::vector<uint64_t> at(n, reinterpret_cast<uintptr_t>(raw.data())), lengths(n, uint64_t{1} << bits);
        refused(fastckpt_gather(at.data(), lengths.data(), n, out.data(), 0), "gather of a sum that wraps", bits);
        refused(fastckpt_lines(at.data(), lengths.data(), n, 0, out.data(), 0), "lines of a sum that wraps", bits);
        if (bits < 60 && fastckpt_lines_bytes(lengths.data(), n) != SIZE_MAX) fail("lines_bytes of a sum that wraps");
    }
    for (const uint64_t address : {uint64_t{0}, ~uint64_t{0} - 15, ~uint64_t{0}}) {
        const uint64_t length = 16;
        refused(fastckpt_gather(&address, &length, 1, out.data(), 16), "gather from", address);
        refused(fastckpt_lines(&address, &length, 1, 0, out.data(), 16), "lines from", address);
    }
    // Null where something is expected.
    const uint64_t at = reinterpret_cast<uintptr_t>(raw.data()), length = 16;
    std::vector<uint64_t> keys(FASTCKPT_ROW_WORDS);
    uint64_t row = 0;
    Exact long_one(4096, 0);
    std::memset(long_one.data(), 1, 4096);
    uint8_t *const none = nullptr, *const x = raw.data(), *const y = out.data();
    const int statuses[] = {
        fastckpt_is_constant(none, kBytes, 2, &found),
        fastckpt_is_constant(x, kBytes, 2, nullptr),
        fastckpt_sample(context, none, x, kBytes, 2, &estimate),
        fastckpt_sample(context, x, x, kBytes, 2, nullptr),
        fastckpt_xxh3_128(none, 4096, digest),
        fastckpt_xxh3_128(long_one.data(), 4096, nullptr),
        fastckpt_gather(nullptr, &length, 1, y, 16),
        fastckpt_gather(&at, nullptr, 1, y, 16),
        fastckpt_gather(&at, &length, 1, none, 16),
        fastckpt_lines(nullptr, &length, 1, 0, y, 16),
        fastckpt_lines(&at, nullptr, 1, 0, y, 16),
        fastckpt_lines(&at, &length, 1, 0, none, 16),
        fastckpt_rows(none, 8, keys.data(), &row, 1),
        fastckpt_rows(x, 8, nullptr, &row, 1),
        fastckpt_rows(x, 8, keys.data(), nullptr, 1),
        fastckpt_cast(none, 4, y),
        fastckpt_cast(x, 4, none),
        fastckpt_cast_equal(none, x, 4, &found),
        fastckpt_cast_equal(y, none, 4, &found),
        fastckpt_cast_equal(y, x, 4, nullptr),
        fastckpt_equal(none, x, 4, &found),
        fastckpt_equal(x, none, 4, &found),
        fastckpt_equal(x, x, 4, nullptr),
        fastckpt_encode(context, none, x, kBytes, FASTCKPT_ROT, 2, 0, y, kBytes, &result),
        fastckpt_encode(context, x, x, kBytes, FASTCKPT_ROT, 2, 0, none, kBytes, &result),
        fastckpt_encode(context, x, x, kBytes, FASTCKPT_ROT, 2, 0, y, kBytes, nullptr),
        fastckpt_encode(nullptr, none, x, kBytes, FASTCKPT_RAW, 2, 0, y, kBytes, &result),
        fastckpt_encode(nullptr, x, x, kBytes, FASTCKPT_RAW, 2, 0, none, kBytes, &result),
        fastckpt_decode(context, none, kBytes, x, kBytes, FASTCKPT_ROT, 2, 0, y, digest),
        fastckpt_decode(context, x, kBytes, x, kBytes, FASTCKPT_ROT, 2, 0, none, digest),
        fastckpt_split(context, none, x, kBytes, FASTCKPT_ROT, 2, 0, y, kBytes, &size),
        fastckpt_split(context, x, x, kBytes, FASTCKPT_ROT, 2, 0, none, kBytes, &size),
        fastckpt_split(context, x, x, kBytes, FASTCKPT_ROT, 2, 0, y, kBytes, nullptr),
        fastckpt_merge(context, none, kBytes, x, kBytes, FASTCKPT_ROT, 2, 0, y),
        fastckpt_merge(context, x, kBytes, x, kBytes, FASTCKPT_ROT, 2, 0, none),
    };
    for (size_t i = 0; i < sizeof statuses / sizeof *statuses; ++i)
        if (statuses[i] != FASTCKPT_BAD_ARGUMENT) fail("null, call %zu: status %d", i, statuses[i]);
    if (fastckpt_context_init(nullptr) || fastckpt_context_init(long_one.data() + 1))
        fail("a context where none can be");
    // Nothing is anywhere.
    if (fastckpt_gather(nullptr, nullptr, 0, nullptr, 0) || fastckpt_lines(nullptr, nullptr, 0, 0, nullptr, 0) ||
        fastckpt_rows(nullptr, 0, keys.data(), nullptr, 0) || fastckpt_cast(nullptr, 0, nullptr) ||
        fastckpt_crc64nvme(0, nullptr, 0))
        fail("nothing is refused");
}

int arguments() {
    Context context(0);
    Bytes raw(64, 0x3f), base(64, 0x3e), stored(4096);
    const auto expect = [&](int wanted, const char* what, fastckpt_context* with, const void* under, size_t n,
                            unsigned transform, unsigned w, unsigned pack_bits) {
        uint8_t digest[16];
        fastckpt_encoded result;
        size_t size;
        const int found[] = {
            fastckpt_encode(with, raw.data(), under, n, transform, w, pack_bits, stored.data(), stored.size(), &result),
            fastckpt_decode(with, stored.data(), stored.size(), under, n, transform, w, pack_bits, raw.data(), digest),
            fastckpt_split(with, raw.data(), under, n, transform, w, pack_bits, stored.data(), stored.size(), &size),
            fastckpt_merge(with, stored.data(), stored.size(), under, n, transform, w, pack_bits, raw.data()),
        };
        for (int status : found)
            if (status != wanted) fail("%s: status %d instead of %d", what, status, wanted);
    };
    expect(FASTCKPT_BAD_ARGUMENT, "no context", nullptr, base.data(), 64, FASTCKPT_ROT, 2, 0);
    expect(FASTCKPT_BAD_ARGUMENT, "transform 0", context, base.data(), 64, 0, 2, 0);
    expect(FASTCKPT_BAD_ARGUMENT, "transform 7", context, base.data(), 64, 7, 2, 0);
    expect(FASTCKPT_BAD_ARGUMENT, "SUB without a base", context, nullptr, 64, FASTCKPT_SUB, 2, 0);
    expect(FASTCKPT_BAD_ARGUMENT, "SUBPACK without a base", context, nullptr, 64, FASTCKPT_SUBPACK, 2, 4);
    for (unsigned w : {0u, 1u, 3u, 16u, ~0u})
        expect(FASTCKPT_BAD_LANE, "lane bytes", context, base.data(), 64, FASTCKPT_ROT, w, 0);
    for (unsigned p : {0u, 3u, 16u, ~0u})
        expect(FASTCKPT_BAD_LANE, "pack bits", context, base.data(), 64, FASTCKPT_SUBPACK, 2, p);
    for (size_t n : {size_t{0}, size_t{63}, size_t{FASTCKPT_MAX_RAW_BYTES} + 2, ~size_t{1}})
        expect(FASTCKPT_BAD_LENGTH, "length", context, base.data(), n, FASTCKPT_ROT, 2, 0);
    fastckpt_encoded result;
    raw[7] = 0x80;  // a sign bit
    if (fastckpt_encode(context, raw.data(), nullptr, 64, FASTCKPT_ROTU, 8, 0, stored.data(), stored.size(), &result) !=
        FASTCKPT_UNFIT)
        fail("ROTU of a sign bit");
    if (fastckpt_encode(context, raw.data(), nullptr, 64, FASTCKPT_RAW, 1, 0, stored.data(), 63, &result) !=
        FASTCKPT_NO_ROOM)
        fail("RAW without room");
    if (fastckpt_use_isa("none such") != FASTCKPT_BAD_ARGUMENT) fail("an instruction set that there is not");
    if (fastckpt_use_isa(nullptr) != FASTCKPT_OK) fail("the best instruction set");
    Random r{5};
    const Bytes big = some_lanes(r, 1, 40000, 8);
    for (size_t n : {size_t{1}, size_t{240}, size_t{241}, size_t{65536}, big.size()}) {
        Exact from(Bytes(big.begin(), big.begin() + static_cast<std::ptrdiff_t>(n)), 3), to(n, 5);
        if (fastckpt_encode(context, from.data(), nullptr, n, FASTCKPT_RAW, 1, 0, to.data(), n, &result))
            fail("RAW of %zu bytes", n);
        uint8_t digest[16];
        digest_of(from.bytes(n), digest);
        if (to.bytes(n) != from.bytes(n) || result.stored_bytes != n ||
            result.crc64nvme != fastckpt_crc64nvme_portable(0, from.data(), n) ||
            std::memcmp(digest, result.digest, 16))
            fail("RAW of %zu bytes gives other ones", n);
    }
    for (unsigned w : {1u, 2u, 4u, 8u})
        for (size_t lanes = 1; lanes < 40; ++lanes) {
            const Bytes equal = some_lanes(r, 2, lanes, w);
            Exact exact(equal, 1);
            int found = -1;
            if (fastckpt_is_constant(exact.data(), equal.size(), w, &found) || found != 1)
                fail("is_constant of equal lanes");
            exact.data()[r.below(equal.size())] ^= 1;
            if (lanes > 1 && (fastckpt_is_constant(exact.data(), equal.size(), w, &found) || found != 0))
                fail("is_constant of different lanes");
        }
    {
        const Bytes a = some_lanes(r, 0, 100, 1), b = some_lanes(r, 0, 1, 1), c = some_lanes(r, 0, 5000, 1);
        const uint64_t at[] = {reinterpret_cast<uintptr_t>(a.data()), reinterpret_cast<uintptr_t>(b.data()), 0,
                               reinterpret_cast<uintptr_t>(c.data())};
        const uint64_t lengths[] = {a.size(), b.size(), 0, c.size()};
        Bytes all = a;
        all.insert(all.end(), b.begin(), b.end());
        all.insert(all.end(), c.begin(), c.end());
        Bytes out(all.size());
        if (fastckpt_gather(at, lengths, 4, out.data(), out.size()) || out != all) fail("gather");
        if (fastckpt_gather(at, lengths, 4, out.data(), out.size() - 1) != FASTCKPT_BAD_LENGTH)
            fail("gather into less room");
        if (fastckpt_gather(at, lengths, 3, out.data(), out.size()) != FASTCKPT_BAD_LENGTH) fail("gather of less");
    }
    for (size_t n : {size_t{0}, size_t{1}, size_t{8}, size_t{32767}, size_t{32768}, size_t{32769}, size_t{100003}}) {
        const Bytes keys = some_lanes(r, 0, FASTCKPT_ROW_WORDS, 8);
        const auto* words = reinterpret_cast<const uint64_t*>(keys.data());
        const Bytes some = some_lanes(r, 0, n + 1, 1);
        Exact memory(Bytes(some.begin(), some.end() - 1), 1);
        Bytes padded = memory.bytes(n);
        padded.resize((n + 32767) / 32768 * 32768);
        std::vector<uint64_t> found(padded.size() / 32768), expected(found.size());
        if (fastckpt_rows(memory.data(), n, words, found.data(), found.size()) ||
            fastckpt_rows(padded.data(), padded.size(), words, expected.data(), expected.size()) || found != expected)
            fail("rows of %zu bytes", n);
        if (fastckpt_rows(memory.data(), n, words, found.data(), found.size() + 1) != FASTCKPT_BAD_LENGTH)
            fail("more rows than there are");
    }
    for (size_t n : {size_t{0}, size_t{1}, size_t{65535}, size_t{65536}, size_t{65537}, size_t{1000001}}) {
        Exact memory(some_lanes(r, 0, n + 1, 1), 1);
        const uint64_t at[] = {reinterpret_cast<uintptr_t>(memory.data()), reinterpret_cast<uintptr_t>(memory.data())},
                       lengths[] = {n, 1};
        Bytes out(n < FASTCKPT_WHOLE_BELOW ? n + 1 : (n + 4095) / 4096 * 64 + 1);
        if (fastckpt_lines_bytes(lengths, 2) != out.size()) fail("a sample of %zu bytes has another length", n);
        for (uint64_t seed : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}})
            if (fastckpt_lines(at, lengths, 2, seed, out.data(), out.size()) || out.back() != memory.data()[0])
                fail("a sample of %zu bytes", n);
        if (fastckpt_lines(at, lengths, 2, 0, out.data(), out.size() - 1) != FASTCKPT_BAD_LENGTH)
            fail("a sample into less room");
    }
    for (unsigned w : {2u, 4u, 8u})
        for (size_t lanes : {1, 7, 32, 33, 3000, 40000}) {
            const Way way{FASTCKPT_SUB, w, 0};
            Bytes x, y;
            some_chunk(r, way, 0, lanes, x, y);
            Exact here(x, 1), under(y, 3);
            fastckpt_estimate estimate;
            if (fastckpt_sample(context, here.data(), under.data(), x.size(), w, &estimate) || estimate.lanes == 0 ||
                estimate.lanes > lanes)
                fail("sample");
            const double most = 8.0 * w + 1;
            for (double bits : {estimate.rot_bits, estimate.sub_bits})
                if (!(bits >= 0 && bits <= most)) fail("sample of %zu lanes: %g bits", lanes, bits);
        }
    Exact wide(some_lanes(r, 1, 5000, 4), 1), narrow(10000, 1);
    int equal = -1;
    if (fastckpt_cast(wide.data(), 5000, narrow.data())) fail("cast");
    if (fastckpt_cast_equal(narrow.data(), wide.data(), 5000, &equal) || equal != 1) fail("cast_equal");
    narrow.data()[9998] ^= 1;
    if (fastckpt_cast_equal(narrow.data(), wide.data(), 5000, &equal) || equal != 0)
        fail("cast_equal of different lanes");
    for (size_t n : {size_t{0}, size_t{1}, size_t{65536}, size_t{65537}, size_t{200001}}) {
        Exact one(some_lanes(r, 0, n + 1, 1), 1), other(one.bytes(n), 3);
        if (fastckpt_equal(one.data(), other.data(), n, &equal) || equal != 1) fail("equal of %zu bytes", n);
        if (!n) continue;
        other.data()[r.below(n)] ^= 1;
        if (fastckpt_equal(one.data(), other.data(), n, &equal) || equal != 0) fail("equal of %zu others", n);
    }
    wild_arguments(r);
    std::printf("arguments: as the interface says\n");
    return 0;
}

// ---- seeds ----

// Inputs of the fuzzers: six bytes that say what follows (fuzz/decode_fuzzer.cpp), then a frame or a stream.
int seeds(const std::string& folder) {
    make_folder(folder);
    make_folder(folder + "/decode");
    make_folder(folder + "/stream");
    Random r{77};
    Context context(0);
    unsigned number = 0;
    for (const Way& way : all_ways())
        for (size_t lanes : {5, 1027, 1500, 3000}) {
            Case c{way, {}, {}, fastckpt_isa()};
            some_chunk(r, way, ++number % 3 ? 0 : 5, lanes, c.raw, c.base);
            Bytes frame;
            fastckpt_encoded result;
            if (const int status = encode(context, c, fastckpt_encode_bound(c.raw.size()), frame, result, r))
                c.wrong("encode", status);
            const size_t less = lanes - 1;
            unsigned lane_code = 0, pack_code = 0;
            while (2u << lane_code < way.w) ++lane_code;
            while (1u << pack_code < way.pack_bits) ++pack_code;
            const Bytes head = {static_cast<uint8_t>(way.transform - FASTCKPT_ROT),
                                static_cast<uint8_t>(lane_code),
                                static_cast<uint8_t>(pack_code),
                                static_cast<uint8_t>(less),
                                static_cast<uint8_t>(less >> 8),
                                static_cast<uint8_t>(less >> 16)};
            const auto save = [&](const char* kind, const Bytes& body) {
                Bytes input = head;
                input.insert(input.end(), body.begin(), body.end());
                write_file(folder + "/" + kind + "/" + std::to_string(number), input);
            };
            save("decode", frame);
            if (lanes == 5) save("stream", split(context, c, r));
        }
    std::printf("seeds: %u frames\n", number);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    const auto number = [&](int i, uint64_t otherwise) {
        return argc > i ? std::strtoull(argv[i], nullptr, 0) : otherwise;
    };
    if (mode == "vectors" && argc == 4) return vectors(argv[2], argv[3]);
    if (mode == "random") return random_tests(number(2, 1), number(3, 12));
    if (mode == "hostile") return hostile(number(2, 1), number(3, 400));
    if (mode == "arguments") return arguments();
    if (mode == "seeds" && argc == 3) return seeds(argv[2]);
    if (argc > 1)
        fail("what to do: vectors DIR OUT, random [SEED [LARGE]], hostile [SEED [ROUNDS]], arguments, seeds DIR");
    return arguments() || random_tests(1, 12) || hostile(1, 400);
}
