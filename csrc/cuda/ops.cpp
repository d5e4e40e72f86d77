// The CUDA launches: check, make the tensors' device current, queue on torch's current stream.
#include "../args.h"
#include "kernels.h"

namespace flexkernels {
namespace {

template <typename Args>
void launch(void (*queue)(const Args&, void*), const Args& args, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  queue(args, stream);
}

void fsq_quantize_cuda(const Tensor& z, const Tensor& thresholds, Levels levels, OptionalTensor codes,
                       OptionalTensor ids) {
  const FsqQuantize args = fsq_quantize_args(z, thresholds, levels, codes, ids);
  if (args.n > 0) launch(cuda::fsq_quantize_launch, args, z);
}

void fsq_dequantize_cuda(const Tensor& ids, Levels levels, const Tensor& codes) {
  const FsqDequantize args = fsq_dequantize_args(ids, levels, codes);
  if (args.n > 0) launch(cuda::fsq_dequantize_launch, args, ids);
}

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

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) {
  m.impl("fsq_quantize", TORCH_BOX(&flexkernels::fsq_quantize_cuda));
  m.impl("fsq_dequantize", TORCH_BOX(&flexkernels::fsq_dequantize_cuda));
  m.impl("flow_step", TORCH_BOX(&flexkernels::flow_step_cuda));
}
