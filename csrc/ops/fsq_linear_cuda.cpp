// The CUDA launches of the FSQ ops with linear layers.
#include "cuda.h"
#include "fsq_linear.h"

namespace flexkernels {
namespace {

void fsq_project_cuda(const Tensor& hidden, const Tensor& weight, OptionalTensor bias, const Tensor& thresholds,
                      Levels levels, double eps, OptionalTensor codes, OptionalTensor ids) {
  const FsqProject args = fsq_project_args(hidden, weight, bias, thresholds, levels, eps, codes, ids);
  if (args.n > 0) launch(cuda::fsq_project_launch, args, hidden);
}

void fsq_embed_cuda(const Tensor& ids, Levels levels, const Tensor& weight, OptionalTensor bias,
                    OptionalTensor positions, OptionalTensor position_index, OptionalTensor tokens,
                    OptionalTensor token_index, const Tensor& out) {
  const FsqEmbed args = fsq_embed_args(ids, levels, weight, bias, positions, position_index, tokens, token_index, out);
  if (args.n > 0) launch(cuda::fsq_embed_launch, args, ids);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) {
  m.impl("fsq_project_quantize", TORCH_BOX(&flexkernels::fsq_project_cuda));
  m.impl("fsq_embed", TORCH_BOX(&flexkernels::fsq_embed_cuda));
}
