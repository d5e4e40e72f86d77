// What the .cu units provide. No torch header: each architecture would parse it again.
#pragma once

#include "../core/attention.h"
#include "../core/decode.h"
#include "../core/flow.h"
#include "../core/fsq.h"
#include "../core/fsq_linear.h"
#include "../core/fsq_train.h"
#include "../core/head_norm.h"
#include "../core/linear.h"
#include "../core/norm.h"
#include "../core/sampling.h"
#include "../core/transformer.h"

namespace flexkernels::cuda {

// each queues its kernel on `stream` (a cudaStream_t) of the current device; std::runtime_error when that fails
// fills memory with 0xff bytes
void poison(void* data, int64_t bytes, void* stream);
void fsq_quantize_launch(const FsqQuantize& p, void* stream);
void fsq_quantize_any_launch(const FsqQuantize& p, void* stream);
void fsq_dequantize_launch(const FsqDequantize& p, void* stream);
void fsq_train_launch(const FsqTrain& p, void* stream);
void fsq_project_launch(const FsqProject& p, void* stream);
void fsq_embed_launch(const FsqEmbed& p, void* stream);
void flow_update_launch(const FlowUpdate& p, void* stream);
void attention_launch(const AttentionForward& p, void* stream);
void decode_attention_launch(const DecodeAttention& p, void* stream);
// of 16-bit caches; called by the one above
void decode_mma_launch(const DecodeAttention& p, void* stream);
void kv_append_launch(const KvAppend& p, void* stream);
void qk_norm_launch(const QkNorm& p, void* stream);
void qk_norm_backward_launch(const QkNormBackward& p, void* stream);
void norm_forward_launch(const NormForward& p, void* stream);
void norm_backward_launch(const NormGradients& p, void* stream);
void segment_order_launch(const SegmentOrder& p, void* stream);
void swiglu_launch(const Swiglu& p, void* stream);
void swiglu_backward_launch(const Swiglu& p, void* stream);
void sample_logits_launch(const SampleLogits& p, void* stream);
// whether the one below takes this `norm`; otherwise its rows must be normed before
bool skinny_linear_norms(const SkinnyLinear& p);
void skinny_linear_launch(const SkinnyLinear& p, void* stream);
// why the persistent kernel of a whole step does not take this one on the current device, or null
const char* transformer_step_refusal(const TransformerStep& p);
void transformer_step_launch(const TransformerStep& p, void* stream);

}  // namespace flexkernels::cuda
