// The loops in plain C++: what every machine can do, and what the others are compared with.
#define FASTCKPT_ISA_NAME "scalar"
#define FASTCKPT_ISA scalar
#include "kernels.inl"

const fastckpt::Kernels* fastckpt::scalar_kernels() { return &fastckpt::scalar::kKernels; }
