// What every ISA level's build of csrc/cpu/*.cpp provides. No torch header: a kernel works on plain pointers and does
// the rows [begin, end).
#pragma once

#include "../core/attention.h"
#include "../core/flow.h"
#include "../core/fsq.h"

#define FLEXKERNELS_DECLARE_KERNELS(isa)                                                \
  namespace flexkernels::isa {                                                          \
  void fsq_quantize_kernel(const FsqQuantize& p, int64_t begin, int64_t end);           \
  void fsq_dequantize_kernel(const FsqDequantize& p, int64_t begin, int64_t end);       \
  void flow_step_kernel(const FlowStep& p, int64_t begin, int64_t end);                 \
  int64_t attention_scratch_bytes(const AttentionForward& p);                           \
  void attention_forward_kernel(const AttentionForward& p, int64_t begin, int64_t end); \
  }

FLEXKERNELS_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
FLEXKERNELS_DECLARE_KERNELS(avx2)
FLEXKERNELS_DECLARE_KERNELS(avx512)
FLEXKERNELS_DECLARE_KERNELS(avx512_bf16)
#endif
