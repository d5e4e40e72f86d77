// What the .cu units provide. No torch header: each architecture would parse it again.
#pragma once

#include "../core/flow.h"
#include "../core/fsq.h"
#include "../core/fsq_linear.h"

namespace flexkernels::cuda {

// each queues its kernel on `stream` (a cudaStream_t) of the current device; std::runtime_error when that fails
void fsq_quantize_launch(const FsqQuantize& p, void* stream);
void fsq_dequantize_launch(const FsqDequantize& p, void* stream);
void fsq_project_launch(const FsqProject& p, void* stream);
void fsq_embed_launch(const FsqEmbed& p, void* stream);
void flow_update_launch(const FlowUpdate& p, void* stream);

}  // namespace flexkernels::cuda
