// Python's way into the C interface. Checks lengths, releases the GIL, turns a status into an exception; nothing else.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "fastckpt.h"

namespace {

struct Buffer {  // releases on scope exit
    Py_buffer view{};
    bool held = false;
    ~Buffer() {
        if (held) PyBuffer_Release(&view);
    }
    bool get(PyObject* object, int flags) { return held = PyObject_GetBuffer(object, &view, flags) == 0; }
};

PyObject* crc64nvme(PyObject*, PyObject* args) {
    PyObject* object;
    unsigned long long crc = 0;
    if (!PyArg_ParseTuple(args, "O|K:crc64nvme", &object, &crc)) return nullptr;
    Buffer data;
    if (!data.get(object, PyBUF_SIMPLE)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    crc = fastckpt_crc64nvme(crc, data.view.buf, static_cast<size_t>(data.view.len));
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(crc);
}

PyObject* crc64nvme_portable(PyObject*, PyObject* object) {
    Buffer data;
    if (!data.get(object, PyBUF_SIMPLE)) return nullptr;
    uint64_t crc;
    Py_BEGIN_ALLOW_THREADS
    crc = fastckpt_crc64nvme_portable(0, data.view.buf, static_cast<size_t>(data.view.len));
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(crc);
}

using Kernel = int (*)(const void*, size_t, unsigned, void*);

PyObject* run(Kernel kernel, PyObject* args) {
    PyObject *source_object, *target_object;
    unsigned int lane_bytes;
    if (!PyArg_ParseTuple(args, "OOI", &source_object, &target_object, &lane_bytes)) return nullptr;
    Buffer source, target;
    if (!source.get(source_object, PyBUF_SIMPLE) || !target.get(target_object, PyBUF_WRITABLE)) return nullptr;
    if (source.view.len != target.view.len)
        return PyErr_Format(PyExc_ValueError, "source has %zd bytes, target %zd: they must be equal", source.view.len,
                            target.view.len);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = kernel(source.view.buf, static_cast<size_t>(source.view.len), lane_bytes, target.view.buf);
    Py_END_ALLOW_THREADS
    if (status == FASTCKPT_BAD_LANE) return PyErr_Format(PyExc_ValueError, "lane_bytes is %u: 2, 4 or 8 are known", lane_bytes);
    if (status == FASTCKPT_BAD_LENGTH)
        return PyErr_Format(PyExc_ValueError, "%zd bytes are no whole number of %u-byte lanes", source.view.len, lane_bytes);
    Py_RETURN_NONE;
}

PyObject* rot_split(PyObject*, PyObject* args) { return run(fastckpt_rot_split, args); }
PyObject* rot_merge(PyObject*, PyObject* args) { return run(fastckpt_rot_merge, args); }

PyMethodDef methods[] = {
    {"crc64nvme", crc64nvme, METH_VARARGS, "crc64nvme(data, crc=0) -> int"},
    {"crc64nvme_portable", crc64nvme_portable, METH_O, "crc64nvme_portable(data) -> int; tables only, for tests"},
    {"rot_split", rot_split, METH_VARARGS, "rot_split(raw, stream, lane_bytes): raw bytes into the ROT stream"},
    {"rot_merge", rot_merge, METH_VARARGS, "rot_merge(stream, raw, lane_bytes): the ROT stream into raw bytes"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastckpt._native", "fastckpt's native kernels", 0, methods,
                      nullptr,               nullptr,            nullptr,                     nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
