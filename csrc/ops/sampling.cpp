// The sampling op: schema and CPU launch. Outputs are allocated by the caller; an op only fills them.
#include "sampling.h"

#include "cpu.h"

namespace flexkernels {
namespace {

void sample_logits_cpu(const Tensor& logits, OptionalTensor uncond, double guidance, double scale, int64_t top_k,
                       int64_t top_p, double log2_minp, int64_t seed, OptionalTensor seeds, int64_t offset,
                       OptionalTensor offsets, const Tensor& ids, OptionalTensor logprob) {
  const SampleLogits args = sample_logits_args(logits, uncond, guidance, scale, top_k, top_p, log2_minp, seed, seeds,
                                               offset, offsets, ids, logprob);
  launch(FLEXKERNELS_SELECT(sample_logits_kernel), args, args.n, args.vocab);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "sample_logits(Tensor logits, Tensor? uncond, float guidance, float scale, int top_k, int top_p, "
      "float log2_minp, int seed, Tensor? seeds, int offset, Tensor? offsets, Tensor(a!) ids, Tensor(b!)? logprob) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("sample_logits", TORCH_BOX(&flexkernels::sample_logits_cpu));
}
