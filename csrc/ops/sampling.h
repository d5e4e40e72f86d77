// Tensors of the sampling op, checked and turned into what the kernels take.
#pragma once

#include "../core/sampling.h"
#include "args.h"

namespace flexkernels {

inline void check_rows(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1), name,
                  " must have the shape [n, vocab] of logits, got another");
  STD_TORCH_CHECK(t.size(1) == 1 || t.stride(1) == 1, name, " must have contiguous rows, got stride ", t.stride(1));
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of logits, got another");
}

inline SampleLogits sample_logits_args(const Tensor& logits, const OptionalTensor& uncond, double guidance,
                                       double scale, int64_t top_k, int64_t top_p, double log2_minp, int64_t seed,
                                       const OptionalTensor& seeds, int64_t offset, const OptionalTensor& offsets,
                                       const Tensor& ids, const OptionalTensor& logprob) {
  SampleLogits p{};
  STD_TORCH_CHECK(logits.dim() == 2, "logits must have 2 dimensions, got ", logits.dim());
  p.dtype = float_dtype("logits", logits);
  check_rows("logits", logits, logits);
  p.n = logits.size(0);
  p.vocab = logits.size(1);
  STD_TORCH_CHECK(p.vocab > 0 && p.vocab <= (int64_t{1} << 18), "vocab must lie between 1 and 262144, got ", p.vocab);
  STD_TORCH_CHECK(top_k >= 1, "top_k must be at least 1, got ", top_k);
  STD_TORCH_CHECK(top_p >= 0 && top_p <= (int64_t{1} << kSampleTopPBits), "top_p must lie between 0 and 2**30, got ",
                  top_p);
  p.logits = logits.const_data_ptr();
  p.logits_stride = logits.stride(0);
  if (uncond) {
    check_scalar_type("uncond", *uncond, logits.scalar_type());
    check_rows("uncond", *uncond, logits);
    p.uncond = uncond->const_data_ptr();
    p.uncond_stride = uncond->stride(0);
  }
  p.seeds = read_optional<int64_t>("seeds", seeds, ScalarType::Long, p.n, logits);
  p.offsets = read_optional<int64_t>("offsets", offsets, ScalarType::Long, p.n, logits);
  check_scalar_type("ids", ids, ScalarType::Long);
  check_numel("ids", ids, p.n);
  check_layout("ids", ids, logits);
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  p.logprob = const_cast<float*>(read_optional<float>("logprob", logprob, ScalarType::Float, p.n, logits));
  p.seed = seed;
  p.offset = offset;
  p.top_k = top_k < p.vocab ? top_k : p.vocab;
  p.top_p = top_p;
  p.guidance = static_cast<float>(guidance);
  p.scale = static_cast<float>(scale);
  p.log2_minp = static_cast<float>(log2_minp);
  return p;
}

}  // namespace flexkernels
