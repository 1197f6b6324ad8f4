// Python's way into the C interface. Checks lengths, releases the GIL, turns a status into an exception; nothing else.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>

#include "fastckpt.h"

namespace {

struct Buffer {  // releases on scope exit
    Py_buffer view{};
    bool held = false;
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (held) PyBuffer_Release(&view);
    }
    bool get(PyObject* object, int flags = PyBUF_SIMPLE) { return held = PyObject_GetBuffer(object, &view, flags) == 0; }
    bool get_optional(PyObject* object) { return object == Py_None || get(object); }
    size_t size() const { return static_cast<size_t>(view.len); }
    void* data() const { return view.buf; }  // null where there is none
};

// One context for each thread that encodes or decodes, as long as the thread lives: 15 MiB of address space, of which ROT touches 1.5.
class ThreadContext {
public:
    ~ThreadContext() { std::free(memory_); }
    fastckpt_context* get() {
        if (!memory_) {
            memory_ = std::aligned_alloc(64, (fastckpt_context_bytes() + 63) / 64 * 64);
            if (memory_) context_ = fastckpt_context_init(memory_);
        }
        return context_;
    }

private:
    void* memory_ = nullptr;
    fastckpt_context* context_ = nullptr;
};
thread_local ThreadContext thread_context;

fastckpt_context* context() {
    fastckpt_context* found = thread_context.get();
    if (!found) PyErr_NoMemory();
    return found;
}

PyObject* raise(int status, size_t n_bytes, unsigned lane_bytes) {
    if (status == FASTCKPT_BAD_LENGTH)
        return PyErr_Format(PyExc_ValueError, "%zu bytes are no whole number of %u-byte lanes, or not 1 to %u", n_bytes, lane_bytes,
                            FASTCKPT_MAX_RAW_BYTES);
    if (status == FASTCKPT_BAD_LANE) return PyErr_Format(PyExc_ValueError, "lane_bytes is %u: 2, 4 or 8 are known (and 1, 2, 4 or 8 pack bits)", lane_bytes);
    if (status == FASTCKPT_BAD_ARGUMENT) return PyErr_Format(PyExc_ValueError, "an unknown transform, or one that needs a base");
    return PyErr_Format(PyExc_ValueError, "status %d", status);
}

bool same_length(const Buffer& raw, const Buffer& base) {
    if (!base.held || base.size() == raw.size()) return true;
    PyErr_Format(PyExc_ValueError, "raw has %zu bytes, base %zu: they must be equal", raw.size(), base.size());
    return false;
}

PyObject* crc64nvme(PyObject*, PyObject* args) {
    PyObject* object;
    unsigned long long crc = 0;
    if (!PyArg_ParseTuple(args, "O|K:crc64nvme", &object, &crc)) return nullptr;
    Buffer data;
    if (!data.get(object)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    crc = fastckpt_crc64nvme(crc, data.data(), data.size());
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(crc);
}

PyObject* crc64nvme_portable(PyObject*, PyObject* object) {
    Buffer data;
    if (!data.get(object)) return nullptr;
    uint64_t crc;
    Py_BEGIN_ALLOW_THREADS
    crc = fastckpt_crc64nvme_portable(0, data.data(), data.size());
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(crc);
}

PyObject* xxh3_128(PyObject*, PyObject* object) {
    Buffer data;
    if (!data.get(object)) return nullptr;
    uint8_t digest[16];
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_xxh3_128(data.data(), data.size(), digest);
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "%zu bytes: expected %u or more", data.size(), FASTCKPT_MIN_DIGEST_BYTES);
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(digest), 16);
}

PyObject* is_constant(PyObject*, PyObject* args) {
    PyObject* object;
    unsigned lane_bytes;
    if (!PyArg_ParseTuple(args, "OI:is_constant", &object, &lane_bytes)) return nullptr;
    Buffer raw;
    if (!raw.get(object)) return nullptr;
    int found;
    Py_BEGIN_ALLOW_THREADS
    found = fastckpt_is_constant(raw.data(), raw.size(), lane_bytes);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(found);
}

PyObject* gather(PyObject*, PyObject* args) {
    PyObject *addresses_object, *lengths_object, *out_object;
    if (!PyArg_ParseTuple(args, "OOO:gather", &addresses_object, &lengths_object, &out_object)) return nullptr;
    Buffer addresses, lengths, out;
    if (!addresses.get(addresses_object) || !lengths.get(lengths_object) || !out.get(out_object, PyBUF_WRITABLE)) return nullptr;
    if (addresses.size() != lengths.size() || addresses.size() % 8) return PyErr_Format(PyExc_ValueError, "%zu bytes of addresses, %zu of lengths: expected as many uint64", addresses.size(), lengths.size());
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_gather(static_cast<const uint64_t*>(addresses.data()), static_cast<const uint64_t*>(lengths.data()), addresses.size() / 8, out.data(), out.size());
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "the stretches are not %zu bytes together", out.size());
    Py_RETURN_NONE;
}

PyObject* lines(PyObject*, PyObject* args) {
    PyObject *addresses_object, *lengths_object, *out_object;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "OOKO:lines", &addresses_object, &lengths_object, &seed, &out_object)) return nullptr;
    Buffer addresses, lengths, out;
    if (!addresses.get(addresses_object) || !lengths.get(lengths_object) || !out.get(out_object, PyBUF_WRITABLE)) return nullptr;
    if (addresses.size() != lengths.size() || addresses.size() % 8) return PyErr_Format(PyExc_ValueError, "%zu bytes of addresses, %zu of lengths: expected as many uint64", addresses.size(), lengths.size());
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_lines(static_cast<const uint64_t*>(addresses.data()), static_cast<const uint64_t*>(lengths.data()), addresses.size() / 8, seed, out.data(), out.size());
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "the sample does not take %zu bytes", out.size());
    Py_RETURN_NONE;
}

PyObject* rows(PyObject*, PyObject* args) {
    PyObject *data_object, *keys_object, *out_object;
    if (!PyArg_ParseTuple(args, "OOO:rows", &data_object, &keys_object, &out_object)) return nullptr;
    Buffer data, keys, out;
    if (!data.get(data_object) || !keys.get(keys_object) || !out.get(out_object, PyBUF_WRITABLE)) return nullptr;
    if (keys.size() != FASTCKPT_ROW_WORDS * 8) return PyErr_Format(PyExc_ValueError, "%zu bytes of keys: expected %u", keys.size(), FASTCKPT_ROW_WORDS * 8);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_rows(data.data(), data.size(), static_cast<const uint64_t*>(keys.data()), static_cast<uint64_t*>(out.data()), out.size() / 8);
    Py_END_ALLOW_THREADS
    if (status) return PyErr_Format(PyExc_ValueError, "%zu bytes are not %zu rows", data.size(), out.size() / 8);
    Py_RETURN_NONE;
}

PyObject* encode(PyObject*, PyObject* args) {
    PyObject *raw_object, *base_object, *stored_object;
    unsigned transform, lane_bytes, pack_bits;
    if (!PyArg_ParseTuple(args, "OOIIIO:encode", &raw_object, &base_object, &transform, &lane_bytes, &pack_bits, &stored_object)) return nullptr;
    Buffer raw, base, stored;
    if (!raw.get(raw_object) || !base.get_optional(base_object) || !stored.get(stored_object, PyBUF_WRITABLE) || !same_length(raw, base)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    fastckpt_encoded result;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_encode(mine, raw.data(), base.data(), raw.size(), transform, lane_bytes, pack_bits, stored.data(), stored.size(), &result);
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_NO_ROOM || status == FASTCKPT_UNFIT) Py_RETURN_NONE;
    if (status) return raise(status, raw.size(), lane_bytes);
    return Py_BuildValue("nKy#", static_cast<Py_ssize_t>(result.stored_bytes), static_cast<unsigned long long>(result.crc64nvme),
                         reinterpret_cast<const char*>(result.digest), Py_ssize_t{16});
}

PyObject* decode(PyObject*, PyObject* args) {
    PyObject *stored_object, *base_object, *raw_object;
    unsigned transform, lane_bytes, pack_bits;
    if (!PyArg_ParseTuple(args, "OOIIIO:decode", &stored_object, &base_object, &transform, &lane_bytes, &pack_bits, &raw_object)) return nullptr;
    Buffer stored, base, raw;
    if (!stored.get(stored_object) || !base.get_optional(base_object) || !raw.get(raw_object, PyBUF_WRITABLE) || !same_length(raw, base)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    uint8_t digest[16];
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_decode(mine, stored.data(), stored.size(), base.data(), raw.size(), transform, lane_bytes, pack_bits, raw.data(), digest);
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_FOREIGN) Py_RETURN_NONE;
    if (status) return raise(status, raw.size(), lane_bytes);
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(digest), 16);
}

PyObject* split(PyObject*, PyObject* args) {
    PyObject *raw_object, *base_object, *stream_object;
    unsigned transform, lane_bytes, pack_bits;
    if (!PyArg_ParseTuple(args, "OOIIIO:split", &raw_object, &base_object, &transform, &lane_bytes, &pack_bits, &stream_object)) return nullptr;
    Buffer raw, base, stream;
    if (!raw.get(raw_object) || !base.get_optional(base_object) || !stream.get(stream_object, PyBUF_WRITABLE) || !same_length(raw, base)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    size_t stream_bytes = 0;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_split(mine, raw.data(), base.data(), raw.size(), transform, lane_bytes, pack_bits, stream.data(), stream.size(), &stream_bytes);
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_NO_ROOM || status == FASTCKPT_UNFIT) Py_RETURN_NONE;
    if (status) return raise(status, raw.size(), lane_bytes);
    return PyLong_FromSize_t(stream_bytes);
}

PyObject* merge(PyObject*, PyObject* args) {
    PyObject *stream_object, *base_object, *raw_object;
    unsigned transform, lane_bytes, pack_bits;
    if (!PyArg_ParseTuple(args, "OOIIIO:merge", &stream_object, &base_object, &transform, &lane_bytes, &pack_bits, &raw_object)) return nullptr;
    Buffer stream, base, raw;
    if (!stream.get(stream_object) || !base.get_optional(base_object) || !raw.get(raw_object, PyBUF_WRITABLE) || !same_length(raw, base)) return nullptr;
    fastckpt_context* const mine = context();
    if (!mine) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_merge(mine, stream.data(), stream.size(), base.data(), raw.size(), transform, lane_bytes, pack_bits, raw.data());
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_FOREIGN) Py_RETURN_FALSE;
    if (status) return raise(status, raw.size(), lane_bytes);
    Py_RETURN_TRUE;
}

PyObject* sample(PyObject*, PyObject* args) {
    PyObject *raw_object, *base_object;
    unsigned lane_bytes;
    if (!PyArg_ParseTuple(args, "OOI:sample", &raw_object, &base_object, &lane_bytes)) return nullptr;
    Buffer raw, base;
    if (!raw.get(raw_object) || !base.get_optional(base_object) || !same_length(raw, base)) return nullptr;
    fastckpt_estimate e;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fastckpt_sample(raw.data(), base.data(), raw.size(), lane_bytes, &e);
    Py_END_ALLOW_THREADS
    if (status) return raise(status, raw.size(), lane_bytes);
    return Py_BuildValue("ddd(dddd)ddK", e.rot_bits, e.rotu_bits, e.sub_bits, e.subpack_bits[0], e.subpack_bits[1], e.subpack_bits[2],
                         e.subpack_bits[3], e.rot_dominant, e.sub_dominant, static_cast<unsigned long long>(e.lanes));
}

PyObject* cast(PyObject*, PyObject* args) {
    PyObject *wide_object, *narrow_object;
    if (!PyArg_ParseTuple(args, "OO:cast", &wide_object, &narrow_object)) return nullptr;
    Buffer wide, narrow;
    if (!wide.get(wide_object) || !narrow.get(narrow_object, PyBUF_WRITABLE)) return nullptr;
    if (wide.size() % 4 || wide.size() != 2 * narrow.size()) return PyErr_Format(PyExc_ValueError, "%zu bytes of float32 are not twice %zu of bfloat16", wide.size(), narrow.size());
    Py_BEGIN_ALLOW_THREADS
    fastckpt_cast(wide.data(), narrow.size() / 2, narrow.data());
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* cast_equal(PyObject*, PyObject* args) {
    PyObject *wide_object, *narrow_object;
    if (!PyArg_ParseTuple(args, "OO:cast_equal", &narrow_object, &wide_object)) return nullptr;
    Buffer wide, narrow;
    if (!wide.get(wide_object) || !narrow.get(narrow_object)) return nullptr;
    if (wide.size() % 4 || wide.size() != 2 * narrow.size()) return PyErr_Format(PyExc_ValueError, "%zu bytes of float32 are not twice %zu of bfloat16", wide.size(), narrow.size());
    int equal;
    Py_BEGIN_ALLOW_THREADS
    equal = fastckpt_cast_equal(narrow.data(), wide.data(), narrow.size() / 2);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(equal);
}

PyObject* isas(PyObject*, PyObject*) { return PyUnicode_FromString(fastckpt_isas()); }
PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastckpt_isa()); }
PyObject* use_isa(PyObject*, PyObject* name) {
    const char* text = name == Py_None ? nullptr : PyUnicode_AsUTF8(name);
    if (!text && PyErr_Occurred()) return nullptr;
    if (fastckpt_use_isa(text)) return PyErr_Format(PyExc_ValueError, "instruction set %R: this machine has %s", name, fastckpt_isas());
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"crc64nvme", crc64nvme, METH_VARARGS, "crc64nvme(data, crc=0) -> int"},
    {"crc64nvme_portable", crc64nvme_portable, METH_O, "crc64nvme_portable(data) -> int; tables only, for tests"},
    {"xxh3_128", xxh3_128, METH_O, "xxh3_128(data) -> bytes; 241 bytes or more"},
    {"is_constant", is_constant, METH_VARARGS, "is_constant(raw, lane_bytes) -> bool"},
    {"gather", gather, METH_VARARGS, "gather(addresses, lengths, out): joins stretches of memory that the caller keeps alive"},
    {"lines", lines, METH_VARARGS, "lines(addresses, lengths, seed, out): a sample of memory that the caller keeps alive"},
    {"rows", rows, METH_VARARGS, "rows(data, keys, out): a number for each 32 KiB"},
    {"encode", encode, METH_VARARGS, "encode(raw, base, transform, lane_bytes, pack_bits, stored) -> (stored bytes, crc, digest), None if it does not fit"},
    {"decode", decode, METH_VARARGS, "decode(stored, base, transform, lane_bytes, pack_bits, raw) -> digest, None for a frame of another writer"},
    {"split", split, METH_VARARGS, "split(raw, base, transform, lane_bytes, pack_bits, stream) -> stream bytes, None if it does not fit"},
    {"merge", merge, METH_VARARGS, "merge(stream, base, transform, lane_bytes, pack_bits, raw) -> whether it was such a stream"},
    {"sample", sample, METH_VARARGS, "sample(raw, base, lane_bytes) -> (rot, rotu, sub, (subpack 1, 2, 4, 8), rot dominant, sub dominant, lanes)"},
    {"cast", cast, METH_VARARGS, "cast(wide, narrow): float32 to bfloat16, to nearest, ties to even"},
    {"cast_equal", cast_equal, METH_VARARGS, "cast_equal(narrow, wide) -> bool"},
    {"isas", isas, METH_NOARGS, "isas() -> instruction sets of this machine, best first"},
    {"isa", isa, METH_NOARGS, "isa() -> the one in use"},
    {"use_isa", use_isa, METH_O, "use_isa(name or None), for tests"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastckpt._native", "fastckpt's native kernels", 0, methods,
                      nullptr,               nullptr,            nullptr,                     nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
