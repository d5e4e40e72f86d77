// The sampling op.
#include "../core/sampling.h"

#include <math.h>

#include <tuple>

#include "op.h"

namespace flexkernels {
namespace {

constexpr int64_t kMaxVocab = int64_t{1} << 18;
// 1 / temperature must stay finite in float32
constexpr double kLargestScale = 3e38;

// one int64 a row, or null; `kept` holds a copy where the values lie apart
const int64_t* per_row(const char* name, const OptionalTensor& values, const Tensor& logits, OptionalTensor& kept) {
  if (!values) return nullptr;
  check_tensor(name, *values, ScalarType::Long, {logits.size(0)}, logits);
  kept = as_contiguous(*values);
  return read<int64_t>(*kept);
}

// the numbers as kernels take them; flexkernels/sampling_math.py does the same
void set_numbers(SampleLogits& p, double guidance, double temperature, int64_t top_k, double top_p, double min_p) {
  STD_TORCH_CHECK(isfinite(guidance), "guidance must be finite, got ", guidance);
  STD_TORCH_CHECK(p.uncond || guidance == 1, "guidance must be 1 without uncond_logits, got ", guidance);
  STD_TORCH_CHECK(isfinite(temperature) && temperature >= 0, "temperature must be finite and at least 0, got ",
                  temperature);
  STD_TORCH_CHECK(top_k >= 1, "top_k must be at least 1, got ", top_k);
  STD_TORCH_CHECK(top_p > 0 && top_p <= 1, "top_p must be above 0 and at most 1, got ", top_p);
  STD_TORCH_CHECK(min_p >= 0 && min_p < 1, "min_p must be at least 0 and below 1, got ", min_p);
  p.guidance = static_cast<float>(guidance);
  p.scale = temperature > 0 ? static_cast<float>(fmin(M_LOG2E / temperature, kLargestScale)) : 0;
  p.top_k = top_k < p.vocab ? top_k : p.vocab;
  p.top_p = top_p < 1 ? static_cast<int64_t>(fmax(nearbyint(ldexp(top_p, kSampleTopPBits)), 1)) : 0;
  p.log2_minp = min_p > 0 ? static_cast<float>(log2(min_p)) : -kSampleInfinity;
}

std::tuple<Tensor, Tensor> sample_logits(const Tensor& logits, OptionalTensor uncond, double guidance,
                                         double temperature, int64_t top_k, double top_p, double min_p, int64_t seed,
                                         OptionalTensor seeds, int64_t offset, OptionalTensor offsets,
                                         bool return_logprob) {
  SampleLogits p{};
  check_dim("logits", logits, 2);
  p.dtype = float_dtype("logits", logits);
  p.n = logits.size(0);
  p.vocab = logits.size(1);
  STD_TORCH_CHECK(p.vocab >= 1 && p.vocab <= kMaxVocab, "logits must have between 1 and ", kMaxVocab, " columns, got ",
                  p.vocab);
  // a grid has up to 8 blocks a row
  STD_TORCH_CHECK(!kCuda || p.n < INT32_MAX / 8, "logits must have fewer than 2**28 rows, got ", p.n);
  if (uncond) check_like("uncond_logits", *uncond, logits);
  const Tensor rows = dense_rows(logits);
  const OptionalTensor uncond_rows = dense_rows(uncond);
  p.logits = rows.const_data_ptr();
  p.logits_stride = rows.stride(0);
  p.uncond = data_of(uncond_rows);
  p.uncond_stride = uncond_rows ? uncond_rows->stride(0) : 0;
  set_numbers(p, guidance, temperature, top_k, top_p, min_p);
  OptionalTensor kept_seeds, kept_offsets;
  p.seeds = per_row("seed", seeds, logits, kept_seeds);
  p.offsets = per_row("offset", offsets, logits, kept_offsets);
  p.seed = seed;
  p.offset = offset;
  const Tensor ids = empty(logits, {p.n}, ScalarType::Long);
  const Tensor logprob = empty(logits, {return_logprob ? p.n : 0}, ScalarType::Float);
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  p.logprob = return_logprob ? static_cast<float*>(logprob.mutable_data_ptr()) : nullptr;
  FLEXKERNELS_LAUNCH(sample_logits, p, logits, p.n, p.vocab);
  return {ids, logprob};
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) { m.impl("sample_logits", TORCH_BOX(&flexkernels::sample_logits)); }
