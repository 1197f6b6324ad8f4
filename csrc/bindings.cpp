// Python's way into the C interface. Checks lengths, releases the GIL, turns a status into an exception; nothing else.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <cstring>

#include "fastckpt.h"

namespace {

// ---- arguments ----

struct Buffer {  // releases on scope exit
    Py_buffer view{};
    bool held = false;
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (held) PyBuffer_Release(&view);
    }
    bool get(PyObject* object, int flags = PyBUF_SIMPLE) {
        return held = PyObject_GetBuffer(object, &view, flags) == 0;
    }
    bool get_optional(PyObject* object) { return object == Py_None || get(object); }
    size_t size() const { return static_cast<size_t>(view.len); }
    void* data() const { return view.buf; }  // null where there is none
};

// Numbers of 8 bytes, where the C interface wants an array of them.
struct Words {
    Buffer buffer;
    bool get(PyObject* object, const char* name, int flags = PyBUF_SIMPLE) {
        if (!buffer.get(object, flags)) return false;
        if (buffer.size() % 8 == 0 && reinterpret_cast<uintptr_t>(buffer.data()) % alignof(uint64_t) == 0) return true;
        PyErr_Format(PyExc_ValueError, "%s: %zu bytes at %p are not uint64 in their places", name, buffer.size(),
                     buffer.data());
        return false;
    }
    size_t size() const { return buffer.size() / 8; }
    uint64_t* data() const { return static_cast<uint64_t*>(buffer.data()); }
};

// An integer of 0 to `most`. Python's own formats, "I" and "K", take any integer and keep its low bits.
struct Number {
    const char* name;
    unsigned long long most;
    unsigned long long value = 0;

    explicit Number(const char* its_name, unsigned long long its_most = 0xffffffff) : name(its_name), most(its_most) {}
    unsigned narrow() const { return static_cast<unsigned>(value); }
};

int to_number(PyObject* object, void* out) {
    auto* const number = static_cast<Number*>(out);
    PyObject* const integer = PyNumber_Index(object);
    if (!integer) return 0;
    number->value = PyLong_AsUnsignedLongLong(integer);
    Py_DECREF(integer);
    const bool failed = PyErr_Occurred() != nullptr;
    if (failed && !PyErr_ExceptionMatches(PyExc_OverflowError)) return 0;
    if (!failed && number->value <= number->most) return 1;
    PyErr_Format(PyExc_ValueError, "%s is %R: expected 0 to %llu", number->name, object, number->most);
    return 0;
}

// (source, base, transform, lane_bytes, pack_bits, destination): what the four functions of the codec take.
struct Call {
    Buffer source, base, destination;
    Number transform{"transform"}, lane_bytes{"lane_bytes"}, pack_bits{"pack_bits"};

    // raw: the side of the call that has as many bytes as the base.
    bool get(PyObject* args, const char* format, const Buffer& raw) {
        PyObject *from, *under, *to;
        return PyArg_ParseTuple(args, format, &from, &under, to_number, &transform, to_number, &lane_bytes, to_number,
                                &pack_bits, &to) &&
               source.get(from) && base.get_optional(under) && destination.get(to, PyBUF_WRITABLE) &&
               same_length(raw, base);
    }
    static bool same_length(const Buffer& raw, const Buffer& base) {
        if (!base.held || base.size() == raw.size()) return true;
        PyErr_Format(PyExc_ValueError, "raw has %zu bytes, base %zu: they must be equal", raw.size(), base.size());
        return false;
    }
};

// ---- what a thread has of its own ----

// One context for each thread that encodes or decodes, as long as the thread lives: 15 MiB of address space, of which
// ROT touches 1.5. And room for the frame that is being read from a file.
class ThreadContext {
public:
    ~ThreadContext() {
        std::free(memory_);
        std::free(frame_);
    }
    fastckpt_context* get() {
        if (!memory_) {
            memory_ = std::aligned_alloc(64, (fastckpt_context_bytes() + 63) / 64 * 64);
            if (memory_) context_ = fastckpt_context_init(memory_);
        }
        return context_;
    }
    void* frame() {
        if (!frame_) frame_ = std::malloc(FASTCKPT_MAX_RAW_BYTES);
        return frame_;
    }

private:
    void* memory_ = nullptr;
    void* frame_ = nullptr;
    fastckpt_context* context_ = nullptr;
};
thread_local ThreadContext thread_context;

fastckpt_context* context() {
    fastckpt_context* found = thread_context.get();
    if (!found) PyErr_NoMemory();
    return found;
}

// ---- errors ----

PyObject* raise(int status, size_t n_bytes, unsigned lane_bytes) {
    switch (status) {
        case FASTCKPT_BAD_LENGTH:
            return PyErr_Format(PyExc_ValueError, "%zu bytes are no whole number of %u-byte lanes, or not 1 to %u",
                                n_bytes, lane_bytes, FASTCKPT_MAX_RAW_BYTES);
        case FASTCKPT_BAD_LANE:
            return PyErr_Format(PyExc_ValueError, "lane_bytes is %u: 2, 4 or 8 are known (and 1, 2, 4 or 8 pack bits)",
                                lane_bytes);
        case FASTCKPT_BAD_ARGUMENT:
            return PyErr_Format(PyExc_ValueError, "an unknown transform, or one that needs a base");
        default: return PyErr_Format(PyExc_ValueError, "status %d", status);
    }
}

// Of functions over stretches of memory: `other` says what their lengths are not.
PyObject* raise_of_stretches(int status, const char* other, size_t out_bytes) {
    if (status == FASTCKPT_BAD_ARGUMENT)
        return PyErr_Format(PyExc_ValueError, "a stretch of memory begins at address 0 or ends past the last address");
    return PyErr_Format(PyExc_ValueError, other, out_bytes);
}

// ---- checksums ----

PyObject* crc64nvme(PyObject*, PyObject* args) {
    PyObject* object;
    Number crc("crc", ~0ull);
    if (!PyArg_ParseTuple(args, "O|O&:crc64nvme", &object, to_number, &crc)) return nullptr;
    Buffer data;
    if (!data.get(object)) return nullptr;
    uint64_t found;
    Py_BEGIN_ALLOW_THREADS
    found = fastckpt_crc64nvme(crc.value, data.data(), data.size());
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(found);
}

PyObject* crc64nvme_portable(PyObject*, PyObject* object) {
    Buffer data;
    if (!data.get(object)) return nullptr;
    uint64_t found;
    Py_BEGIN_ALLOW_THREADS
    found = fastckpt_crc64nvme_portable(0, data.data(), data.size());
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(found);
}

PyObject* crc64nvme_combine(PyObject*, PyObject* args) {
    Number first("first", ~0ull), second("second", ~0ull), n_bytes("second_bytes", ~0ull);
    if (!PyArg_ParseTuple(args, "O&O&O&:crc64nvme_combine", to_number, &first, to_number, &second, to_number, &n_bytes))
        return nullptr;
    return PyLong_FromUnsignedLongLong(fastckpt_crc64nvme_combine(first.value, second.value, n_bytes.value));
}

PyObject* xxh3_128(PyObject*, PyObject* object) {
    Buffer data;
    if (!data.get(object)) return nullptr;
    uint8_t digest[16];
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_xxh3_128(data.data(), data.size(), digest);
    Py_END_ALLOW_THREADS
    if (status)
        return PyErr_Format(PyExc_ValueError, "%zu bytes: expected %u or more", data.size(), FASTCKPT_MIN_DIGEST_BYTES);
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(digest), 16);
}

// ---- memory ----

PyObject* is_constant(PyObject*, PyObject* args) {
    PyObject* object;
    Number lane_bytes("lane_bytes");
    if (!PyArg_ParseTuple(args, "OO&:is_constant", &object, to_number, &lane_bytes)) return nullptr;
    Buffer raw;
    if (!raw.get(object)) return nullptr;
    int found, status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_is_constant(raw.data(), raw.size(), lane_bytes.narrow(), &found);
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_BAD_LANE)
        return PyErr_Format(PyExc_ValueError, "lane_bytes is %u: 1, 2, 4 or 8 are known", lane_bytes.narrow());
    if (status)
        return PyErr_Format(PyExc_ValueError, "%zu bytes are no whole number of %u-byte lanes, one or more", raw.size(),
                            lane_bytes.narrow());
    return PyBool_FromLong(found);
}

PyObject* equal(PyObject*, PyObject* args) {
    PyObject *a_object, *b_object;
    if (!PyArg_ParseTuple(args, "OO:equal", &a_object, &b_object)) return nullptr;
    Buffer a, b;
    if (!a.get(a_object) || !b.get(b_object)) return nullptr;
    if (a.size() != b.size()) Py_RETURN_FALSE;
    int found, status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_equal(a.data(), b.data(), a.size(), &found);
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "status %d", status);
    return PyBool_FromLong(found);
}

bool as_many(const Words& addresses, const Words& lengths) {
    if (addresses.size() == lengths.size()) return true;
    PyErr_Format(PyExc_ValueError, "%zu addresses, %zu lengths: expected as many", addresses.size(), lengths.size());
    return false;
}

PyObject* gather(PyObject*, PyObject* args) {
    PyObject *addresses_object, *lengths_object, *out_object;
    if (!PyArg_ParseTuple(args, "OOO:gather", &addresses_object, &lengths_object, &out_object)) return nullptr;
    Words addresses, lengths;
    Buffer out;
    if (!addresses.get(addresses_object, "addresses") || !lengths.get(lengths_object, "lengths") ||
        !out.get(out_object, PyBUF_WRITABLE) || !as_many(addresses, lengths))
        return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_gather(addresses.data(), lengths.data(), addresses.size(), out.data(), out.size());
    Py_END_ALLOW_THREADS
    if (status) return raise_of_stretches(status, "the stretches are not %zu bytes together", out.size());
    Py_RETURN_NONE;
}

PyObject* lines(PyObject*, PyObject* args) {
    PyObject *addresses_object, *lengths_object, *out_object;
    Number seed("seed", ~0ull);
    if (!PyArg_ParseTuple(args, "OOO&O:lines", &addresses_object, &lengths_object, to_number, &seed, &out_object))
        return nullptr;
    Words addresses, lengths;
    Buffer out;
    if (!addresses.get(addresses_object, "addresses") || !lengths.get(lengths_object, "lengths") ||
        !out.get(out_object, PyBUF_WRITABLE) || !as_many(addresses, lengths))
        return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_lines(addresses.data(), lengths.data(), addresses.size(), seed.value, out.data(), out.size());
    Py_END_ALLOW_THREADS
    if (status) return raise_of_stretches(status, "the sample does not take %zu bytes", out.size());
    Py_RETURN_NONE;
}

PyObject* rows(PyObject*, PyObject* args) {
    PyObject *data_object, *keys_object, *out_object;
    if (!PyArg_ParseTuple(args, "OOO:rows", &data_object, &keys_object, &out_object)) return nullptr;
    Buffer data;
    Words keys, out;
    if (!data.get(data_object) || !keys.get(keys_object, "keys") || !out.get(out_object, "rows", PyBUF_WRITABLE))
        return nullptr;
    if (keys.size() != FASTCKPT_ROW_WORDS)
        return PyErr_Format(PyExc_ValueError, "%zu keys: expected %u", keys.size(), FASTCKPT_ROW_WORDS);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_rows(data.data(), data.size(), keys.data(), out.data(), out.size());
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "%zu bytes are not %zu rows", data.size(), out.size());
    Py_RETURN_NONE;
}

PyObject* fingerprint(PyObject*, PyObject* args) {
    PyObject *data_object, *keys_object, *out_object;
    if (!PyArg_ParseTuple(args, "OOO:fingerprint", &data_object, &keys_object, &out_object)) return nullptr;
    Buffer data;
    Words keys, out;
    if (!data.get(data_object) || !keys.get(keys_object, "keys") || !out.get(out_object, "out", PyBUF_WRITABLE))
        return nullptr;
    if (keys.size() != 2 || out.size() != 2)
        return PyErr_Format(PyExc_ValueError, "%zu keys, room for %zu words: expected 2 of each", keys.size(),
                            out.size());
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_fingerprint(data.data(), data.size(), keys.data(), out.data());
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "status %d", status);
    Py_RETURN_NONE;
}

// The kernel's text, for the compiler that a device's driver brings: one source, and no file that could be another one.
#if defined(__ELF__)
__asm__(
    ".pushsection .rodata\n"
    "fastckpt_cuda_text:\n"
    ".incbin \"csrc/cuda/fingerprint.cuh\"\n"
    "fastckpt_cuda_text_end:\n"
    ".byte 0\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const char fastckpt_cuda_text[], fastckpt_cuda_text_end[];

PyObject* cuda_source(PyObject*, PyObject*) {
    return PyUnicode_FromStringAndSize(fastckpt_cuda_text, fastckpt_cuda_text_end - fastckpt_cuda_text);
}
#else  // of systems without CUDA
PyObject* cuda_source(PyObject*, PyObject*) { Py_RETURN_NONE; }
#endif

// ---- the codec ----

PyObject* encode(PyObject*, PyObject* args) {
    Call call;
    if (!call.get(args, "OOO&O&O&O:encode", call.source)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    fastckpt_encoded result;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_encode(mine, call.source.data(), call.base.data(), call.source.size(), call.transform.narrow(),
                             call.lane_bytes.narrow(), call.pack_bits.narrow(), call.destination.data(),
                             call.destination.size(), &result);
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_NO_ROOM || status == FASTCKPT_UNFIT) Py_RETURN_NONE;
    if (status) return raise(status, call.source.size(), call.lane_bytes.narrow());
    return Py_BuildValue("nKy#", static_cast<Py_ssize_t>(result.stored_bytes),
                         static_cast<unsigned long long>(result.crc64nvme),
                         reinterpret_cast<const char*>(result.digest), Py_ssize_t{16});
}

PyObject* decode(PyObject*, PyObject* args) {
    Call call;
    if (!call.get(args, "OOO&O&O&O:decode", call.destination)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    uint8_t digest[16];
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_decode(mine, call.source.data(), call.source.size(), call.base.data(), call.destination.size(),
                             call.transform.narrow(), call.lane_bytes.narrow(), call.pack_bits.narrow(),
                             call.destination.data(), digest);
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_FOREIGN) Py_RETURN_NONE;
    if (status) return raise(status, call.destination.size(), call.lane_bytes.narrow());
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(digest), 16);
}

PyObject* read_chunks(PyObject*, PyObject* args) {
    PyObject *memory_object, *chunks_object, *outcomes_object;
    int file;
    if (!PyArg_ParseTuple(args, "iOOO:read_chunks", &file, &memory_object, &chunks_object, &outcomes_object))
        return nullptr;
    Buffer memory, chunks, outcomes;
    if (!memory.get_optional(memory_object) || !chunks.get(chunks_object) ||
        !outcomes.get(outcomes_object, PyBUF_WRITABLE))
        return nullptr;
    if ((file < 0) != memory.held)
        return PyErr_Format(PyExc_ValueError, "file is %d: expected a descriptor, or -1 and memory", file);
    const size_t n = chunks.size() / sizeof(fastckpt_chunk);
    if (chunks.size() != n * sizeof(fastckpt_chunk) || outcomes.size() != n * sizeof(fastckpt_outcome) ||
        reinterpret_cast<uintptr_t>(chunks.data()) % alignof(fastckpt_chunk) ||
        reinterpret_cast<uintptr_t>(outcomes.data()) % alignof(fastckpt_outcome))
        return PyErr_Format(PyExc_ValueError, "%zu and %zu bytes are not as many chunks of %zu and outcomes of %zu",
                            chunks.size(), outcomes.size(), sizeof(fastckpt_chunk), sizeof(fastckpt_outcome));
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    void* const frame = file < 0 ? nullptr : thread_context.frame();
    if (file >= 0 && !frame) return PyErr_NoMemory();
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_read_chunks(mine, file, memory.data(), memory.size(), frame, frame ? FASTCKPT_MAX_RAW_BYTES : 0,
                                  static_cast<fastckpt_chunk*>(chunks.data()), n,
                                  static_cast<fastckpt_outcome*>(outcomes.data()));
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "status %d", status);
    Py_RETURN_NONE;
}

PyObject* split(PyObject*, PyObject* args) {
    Call call;
    if (!call.get(args, "OOO&O&O&O:split", call.source)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    size_t stream_bytes = 0;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_split(mine, call.source.data(), call.base.data(), call.source.size(), call.transform.narrow(),
                            call.lane_bytes.narrow(), call.pack_bits.narrow(), call.destination.data(),
                            call.destination.size(), &stream_bytes);
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_NO_ROOM || status == FASTCKPT_UNFIT) Py_RETURN_NONE;
    if (status) return raise(status, call.source.size(), call.lane_bytes.narrow());
    return PyLong_FromSize_t(stream_bytes);
}

PyObject* merge(PyObject*, PyObject* args) {
    Call call;
    if (!call.get(args, "OOO&O&O&O:merge", call.destination)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_merge(mine, call.source.data(), call.source.size(), call.base.data(), call.destination.size(),
                            call.transform.narrow(), call.lane_bytes.narrow(), call.pack_bits.narrow(),
                            call.destination.data());
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_FOREIGN) Py_RETURN_FALSE;
    if (status) return raise(status, call.destination.size(), call.lane_bytes.narrow());
    Py_RETURN_TRUE;
}

PyObject* sample(PyObject*, PyObject* args) {
    PyObject *raw_object, *base_object;
    Number lane_bytes("lane_bytes");
    if (!PyArg_ParseTuple(args, "OOO&:sample", &raw_object, &base_object, to_number, &lane_bytes)) return nullptr;
    Buffer raw, base;
    if (!raw.get(raw_object) || !base.get_optional(base_object) || !Call::same_length(raw, base)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    fastckpt_estimate e;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_sample(mine, raw.data(), base.data(), raw.size(), lane_bytes.narrow(), &e);
    Py_END_ALLOW_THREADS
    if (status) return raise(status, raw.size(), lane_bytes.narrow());
    return Py_BuildValue("ddd(dddd)ddK", e.rot_bits, e.rotu_bits, e.sub_bits, e.subpack_bits[0], e.subpack_bits[1],
                         e.subpack_bits[2], e.subpack_bits[3], e.rot_dominant, e.sub_dominant,
                         static_cast<unsigned long long>(e.lanes));
}

bool twice_as_long(const Buffer& wide, const Buffer& narrow) {
    if (wide.size() % 4 == 0 && wide.size() / 2 == narrow.size()) return true;
    PyErr_Format(PyExc_ValueError, "%zu bytes of float32 are not twice %zu of bfloat16", wide.size(), narrow.size());
    return false;
}

PyObject* cast(PyObject*, PyObject* args) {
    PyObject *wide_object, *narrow_object;
    if (!PyArg_ParseTuple(args, "OO:cast", &wide_object, &narrow_object)) return nullptr;
    Buffer wide, narrow;
    if (!wide.get(wide_object) || !narrow.get(narrow_object, PyBUF_WRITABLE) || !twice_as_long(wide, narrow))
        return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_cast(wide.data(), narrow.size() / 2, narrow.data());
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "status %d", status);
    Py_RETURN_NONE;
}

PyObject* cast_equal(PyObject*, PyObject* args) {
    PyObject *wide_object, *narrow_object;
    if (!PyArg_ParseTuple(args, "OO:cast_equal", &narrow_object, &wide_object)) return nullptr;
    Buffer wide, narrow;
    if (!wide.get(wide_object) || !narrow.get(narrow_object) || !twice_as_long(wide, narrow)) return nullptr;
    int equal, status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_cast_equal(narrow.data(), wide.data(), narrow.size() / 2, &equal);
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "status %d", status);
    return PyBool_FromLong(equal);
}

// ---- instruction sets ----

PyObject* isas(PyObject*, PyObject*) { return PyUnicode_FromString(fastckpt_isas()); }
PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastckpt_isa()); }
PyObject* use_isa(PyObject*, PyObject* name) {
    Py_ssize_t n = 0;
    const char* text = name == Py_None ? nullptr : PyUnicode_AsUTF8AndSize(name, &n);
    if (!text && PyErr_Occurred()) return nullptr;
    const bool whole = !text || std::strlen(text) == static_cast<size_t>(n);  // no null character within
    if (!whole || fastckpt_use_isa(text))
        return PyErr_Format(PyExc_ValueError, "instruction set %R: this machine has %s", name, fastckpt_isas());
    Py_RETURN_NONE;
}

// ---- the module ----

PyMethodDef methods[] = {
    {"crc64nvme", crc64nvme, METH_VARARGS, "crc64nvme(data, crc=0) -> int"},
    {"crc64nvme_combine", crc64nvme_combine, METH_VARARGS,
     "crc64nvme_combine(first, second, second_bytes) -> int; of two stretches one after the other"},
    {"crc64nvme_portable", crc64nvme_portable, METH_O, "crc64nvme_portable(data) -> int; tables only, for tests"},
    {"xxh3_128", xxh3_128, METH_O, "xxh3_128(data) -> bytes; 241 bytes or more"},
    {"is_constant", is_constant, METH_VARARGS, "is_constant(raw, lane_bytes) -> bool"},
    {"equal", equal, METH_VARARGS, "equal(a, b) -> whether both have the same bytes"},
    {"gather", gather, METH_VARARGS,
     "gather(addresses, lengths, out): joins stretches of memory that the caller keeps alive"},
    {"lines", lines, METH_VARARGS,
     "lines(addresses, lengths, seed, out): a sample of memory that the caller keeps alive"},
    {"rows", rows, METH_VARARGS, "rows(data, keys, out): a number for each 32 KiB"},
    {"fingerprint", fingerprint, METH_VARARGS, "fingerprint(data, keys, out): two words for all of it"},
    {"cuda_source", cuda_source, METH_NOARGS, "cuda_source() -> text of the kernel of fingerprint, or None"},
    {"encode", encode, METH_VARARGS,
     "encode(raw, base, transform, lane_bytes, pack_bits, stored) -> (stored bytes, crc, digest), None if it does not "
     "fit"},
    {"decode", decode, METH_VARARGS,
     "decode(stored, base, transform, lane_bytes, pack_bits, raw) -> digest, None for a frame of another writer"},
    {"read_chunks", read_chunks, METH_VARARGS,
     "read_chunks(file, memory, chunks, outcomes): a file's descriptor, or -1 and the memory that has the stored "
     "bytes"},
    {"split", split, METH_VARARGS,
     "split(raw, base, transform, lane_bytes, pack_bits, stream) -> stream bytes, None if it does not fit"},
    {"merge", merge, METH_VARARGS,
     "merge(stream, base, transform, lane_bytes, pack_bits, raw) -> whether it was such a stream"},
    {"sample", sample, METH_VARARGS,
     "sample(raw, base, lane_bytes) -> (rot, rotu, sub, (subpack 1, 2, 4, 8), rot dominant, sub dominant, lanes)"},
    {"cast", cast, METH_VARARGS, "cast(wide, narrow): float32 to bfloat16, to nearest, ties to even"},
    {"cast_equal", cast_equal, METH_VARARGS, "cast_equal(narrow, wide) -> bool"},
    {"isas", isas, METH_NOARGS, "isas() -> instruction sets of this machine, best first"},
    {"isa", isa, METH_NOARGS, "isa() -> the one in use"},
    {"use_isa", use_isa, METH_O, "use_isa(name or None), for tests"},
    {nullptr, nullptr, 0, nullptr},
};

// Multi-phase (PEP 489), without state: the functions share nothing but which instruction set is in use, which is
// atomic, and tables that are made when the library is loaded; what they write to is the caller's, or a thread's own
// context. So neither subinterpreters nor threads without a GIL can be in each other's way.
PyModuleDef_Slot slots[] = {
#ifdef Py_mod_multiple_interpreters  // from Python 3.12
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil  // from Python 3.13; without it a free-threaded Python would take up its GIL again
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "fastckpt._native",
    .m_doc = "fastckpt's native kernels",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = nullptr,
    .m_clear = nullptr,
    .m_free = nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&module); }
