// Where operators register. The emulated build holds the same operators under torch.ops.mmoe_emulated: tensors lie in
// CPU memory there and the CUDA implementation runs on csrc/emulator.
//   MMOE_OPERATORS(m) { m.def(...); }        the schemas, once
//   MMOE_CPU(m) { m.impl(...); }             in <operator>_cpu.cpp
//   MMOE_CUDA(m) { m.impl(...); }            in <operator>_cuda.cu
#pragma once

#include <torch/csrc/stable/library.h>

#ifdef MMOE_EMULATED
// MMOE_EMULATED is the namespace: mmoe_emulated, or mmoe_counted where the emulator counts memory traffic. Torch's
// macros would take that word itself for the name, hence a step between.
#define MMOE_DEFINE_IN(space, m) STABLE_TORCH_LIBRARY(space, m)
#define MMOE_IMPLEMENT_IN(space, m) STABLE_TORCH_LIBRARY_IMPL(space, CPU, m)
#define MMOE_OPERATORS(m) MMOE_DEFINE_IN(MMOE_EMULATED, m)
#define MMOE_CUDA(m) MMOE_IMPLEMENT_IN(MMOE_EMULATED, m)
#else
#define MMOE_OPERATORS(m) STABLE_TORCH_LIBRARY(mmoe, m)
#define MMOE_CPU(m) STABLE_TORCH_LIBRARY_IMPL(mmoe, CPU, m)
#define MMOE_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(mmoe, CUDA, m)
#endif
