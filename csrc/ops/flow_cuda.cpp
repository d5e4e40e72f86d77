// The CUDA launches of the flow ops.
#include "cuda.h"
#include "flow.h"

namespace flexkernels {
namespace {

void flow_step_cuda(const Tensor& x, const Tensor& v_cond, OptionalTensor v_uncond, OptionalTensor momentum_buffer,
                    OptionalTensor row_offsets, int64_t rows, double dt, int64_t guidance, double scale,
                    double threshold, double eta, double momentum, OptionalTensor prefix, OptionalTensor prefix_offsets,
                    OptionalTensor prefix_noise, double prefix_time, const Tensor& x_next,
                    OptionalTensor momentum_next) {
  const FlowStep args =
      flow_step_args(x, v_cond, v_uncond, momentum_buffer, row_offsets, rows, dt, guidance, scale, threshold, eta,
                     momentum, prefix, prefix_offsets, prefix_noise, prefix_time, x_next, momentum_next);
  STD_TORCH_CHECK(rows <= INT32_MAX, "rows must be below 2**31, got ", rows);
  if (rows > 0) launch(cuda::flow_step_launch, args, x);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) { m.impl("flow_step", TORCH_BOX(&flexkernels::flow_step_cuda)); }
