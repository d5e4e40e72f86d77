// What every ISA level's build of csrc/cpu/*.cpp provides. No torch header: a kernel works on plain pointers and does
// the rows [begin, end).
#pragma once

#include "../core/attention.h"
#include "../core/conv.h"
#include "../core/decode.h"
#include "../core/flow.h"
#include "../core/fsq.h"
#include "../core/fsq_linear.h"
#include "../core/fsq_train.h"
#include "../core/head_norm.h"
#include "../core/linear.h"
#include "../core/norm.h"
#include "../core/sampling.h"

#define FLEXKERNELS_DECLARE_KERNELS(isa)                                                  \
  namespace flexkernels::isa {                                                            \
  void fsq_quantize_kernel(const FsqQuantize& p, int64_t begin, int64_t end);             \
  void fsq_dequantize_kernel(const FsqDequantize& p, int64_t begin, int64_t end);         \
  void fsq_train_kernel(const FsqTrain& p, int64_t begin, int64_t end);                   \
  void flow_update_kernel(const FlowUpdate& p, int64_t begin, int64_t end);               \
  int64_t attention_scratch_bytes(const AttentionForward& p);                             \
  void attention_forward_kernel(const AttentionForward& p, int64_t begin, int64_t end);   \
  int64_t attention_backward_scratch_bytes(const AttentionBackward& p);                   \
  void attention_backward_kernel(const AttentionBackward& p, int64_t begin, int64_t end); \
  void decode_attention_kernel(const DecodeAttention& p, int64_t begin, int64_t end);     \
  void kv_append_kernel(const KvAppend& p, int64_t begin, int64_t end);                   \
  void qk_norm_kernel(const QkNorm& p, int64_t begin, int64_t end);                       \
  void qk_norm_backward_kernel(const QkNormBackward& p, int64_t begin, int64_t end);      \
  void norm_forward_kernel(const NormForward& p, int64_t begin, int64_t end);             \
  void norm_backward_kernel(const NormGradients& p, int64_t begin, int64_t end);          \
  void norm_sums_kernel(const NormSums& p, int64_t begin, int64_t end);                   \
  void swiglu_kernel(const Swiglu& p, int64_t begin, int64_t end);                        \
  void swiglu_backward_kernel(const Swiglu& p, int64_t begin, int64_t end);               \
  void fsq_project_kernel(const FsqProject& p, int64_t begin, int64_t end);               \
  void fsq_embed_kernel(const FsqEmbed& p, int64_t begin, int64_t end);                   \
  void sample_logits_kernel(const SampleLogits& p, int64_t begin, int64_t end);           \
  void skinny_linear_kernel(const SkinnyLinear& p, int64_t begin, int64_t end);           \
  void causal_conv_kernel(const CausalConv& p, int64_t begin, int64_t end);               \
  void norm_silu_kernel(const NormSilu& p, int64_t begin, int64_t end);                   \
  }

FLEXKERNELS_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
FLEXKERNELS_DECLARE_KERNELS(avx2)
FLEXKERNELS_DECLARE_KERNELS(avx512)
FLEXKERNELS_DECLARE_KERNELS(avx512_bf16)
#endif
