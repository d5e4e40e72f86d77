// The CUDA launches of the flow ops.
#include "cuda.h"
#include "flow.h"

namespace flexkernels {
namespace {

void flow_update_cuda(const Tensor& x, const Tensor& v_cond, OptionalTensor v_uncond, OptionalTensor momentum_buffer,
                      OptionalTensor row_offsets, OptionalTensor prefix, OptionalTensor prefix_offsets,
                      OptionalTensor prefix_noise, Tensors more_x, Tensors past, int64_t rows, Weights a, double b,
                      Weights past_b, int64_t guidance, double scale, double threshold, double eta, double momentum,
                      double rescale, double prefix_time, const Tensor& x_next, OptionalTensor momentum_next,
                      OptionalTensor velocity) {
  const FlowUpdate args = flow_update_args(x, v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets,
                                           prefix_noise, more_x, past, rows, a, b, past_b, guidance, scale, threshold,
                                           eta, momentum, rescale, prefix_time, x_next, momentum_next, velocity);
  STD_TORCH_CHECK(rows <= INT32_MAX, "rows must be below 2**31, got ", rows);
  if (rows > 0) launch(cuda::flow_update_launch, args, x);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) {
  m.impl("flow_update", TORCH_BOX(&flexkernels::flow_update_cuda));
}
