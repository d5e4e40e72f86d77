// What the .cu units provide. No torch header: each architecture would parse it again.
#pragma once

#include "../core/flow.h"
#include "../core/fsq.h"
#include "../core/linear.h"
#include "../core/sampling.h"

namespace flexkernels::cuda {

// each queues its kernel on `stream` (a cudaStream_t) of the current device; std::runtime_error when that fails
void fsq_quantize_launch(const FsqQuantize& p, void* stream);
void fsq_dequantize_launch(const FsqDequantize& p, void* stream);
void flow_step_launch(const FlowStep& p, void* stream);
void sample_logits_launch(const SampleLogits& p, void* stream);
void skinny_linear_launch(const SkinnyLinear& p, void* stream);

}  // namespace flexkernels::cuda
