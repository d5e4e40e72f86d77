// The CUDA launch of the sampling op.
#include "cuda.h"
#include "sampling.h"

namespace flexkernels {
namespace {

void sample_logits_cuda(const Tensor& logits, OptionalTensor uncond, double guidance, double scale, int64_t top_k,
                        int64_t top_p, double log2_minp, int64_t seed, OptionalTensor seeds, int64_t offset,
                        OptionalTensor offsets, const Tensor& ids, OptionalTensor logprob) {
  const SampleLogits args = sample_logits_args(logits, uncond, guidance, scale, top_k, top_p, log2_minp, seed, seeds,
                                               offset, offsets, ids, logprob);
  STD_TORCH_CHECK(args.n <= INT32_MAX, "rows must be below 2**31, got ", args.n);
  if (args.n > 0) launch(cuda::sample_logits_launch, args, logits);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) {
  m.impl("sample_logits", TORCH_BOX(&flexkernels::sample_logits_cuda));
}
