// The CUDA launches of the FSQ ops.
#include "cuda.h"
#include "fsq.h"

namespace flexkernels {
namespace {

void fsq_quantize_cuda(const Tensor& z, const Tensor& thresholds, Levels levels, OptionalTensor codes,
                       OptionalTensor ids, OptionalTensor table) {
  const FsqQuantize args = fsq_quantize_args(z, thresholds, levels, codes, ids, table);
  if (args.n > 0) launch(cuda::fsq_quantize_launch, args, z);
}

void fsq_dequantize_cuda(const Tensor& ids, Levels levels, const Tensor& codes, OptionalTensor table) {
  const FsqDequantize args = fsq_dequantize_args(ids, levels, codes, table);
  if (args.n > 0) launch(cuda::fsq_dequantize_launch, args, ids);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) {
  m.impl("fsq_quantize", TORCH_BOX(&flexkernels::fsq_quantize_cuda));
  m.impl("fsq_dequantize", TORCH_BOX(&flexkernels::fsq_dequantize_cuda));
}
