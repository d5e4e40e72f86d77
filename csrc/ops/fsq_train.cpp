// FSQ as it is trained.
#include "../core/fsq_train.h"

#include <math.h>

#include <tuple>

#include "fsq.h"

namespace flexkernels {
namespace {

// 32 random bits lie below it with this probability
uint64_t threshold_of(const char* name, double chance) {
  STD_TORCH_CHECK(chance >= 0 && chance <= 1, name, " must lie between 0 and 1, got ", chance);
  return static_cast<uint64_t>(nearbyint(chance * 0x1p32));
}

FsqCounter counter_of(const char* name, int64_t value, const OptionalTensor& at, const Tensor& z) {
  if (at) check_dim(name, *at, 0);
  return {read_optional<int64_t>(name, at, ScalarType::Long, 1, z), value};
}

// a contiguous int64 or int32 number for each row of z
OptionalTensor checked_sample(const OptionalTensor& sample, const Tensor& z) {
  if (!sample) return sample;
  const ScalarType type = sample->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, "sample must be int64 or int32, got ",
                  torch::headeronly::toString(type));
  check_dim("sample", *sample, z.dim() - 1);
  for (int64_t d = 0; d < sample->dim(); ++d) check_size("sample", *sample, d, z.size(d));
  check_device("sample", *sample, z);
  return as_contiguous(sample);
}

// tanh(z + shift) as PyTorch evaluates it, whose bits the specification has
Tensor bounded(const FsqCall& call) {
  const Tensor& rows = call.rows;
  const Tensor wide = rows.scalar_type() == ScalarType::Float ? rows : torch::stable::to(rows, ScalarType::Float);
  std::array<StableIValue, 1> stack{
      torch::stable::detail::from(torch::stable::subtract(wide, call.tables->shift, -1.0))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::tanh", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// codes, ids and, where ids may be drawn, whether a row's is (else empty)
std::tuple<Tensor, Tensor, Tensor> fsq_quantize_train(const Tensor& z, const Levels& levels, int64_t seed,
                                                      OptionalTensor seeds, int64_t offset, OptionalTensor offsets,
                                                      OptionalTensor sample, double drop_p, double corrupt_p,
                                                      double min_corrupt_p, double apply_p, ScalarType ids_dtype) {
  STD_TORCH_CHECK(z.dim() > 1, "z must have a dimension of samples or tokens before the last, got ", z.dim(),
                  " dimensions");
  FsqTrain p{};
  p.drop = threshold_of("drop_p", drop_p);
  p.corrupt = threshold_of("corrupt_p", corrupt_p);
  p.min_corrupt = threshold_of("min_corrupt_p", min_corrupt_p);
  p.apply = threshold_of("apply_p", apply_p);
  STD_TORCH_CHECK(min_corrupt_p <= corrupt_p, "min_corrupt_p must be at most corrupt_p, ", corrupt_p, ", got ",
                  min_corrupt_p);
  p.seed = counter_of("seed", seed, seeds, z);
  p.offset = counter_of("offset", offset, offsets, z);
  sample = checked_sample(sample, z);
  const FsqCall call = fsq_call(z, levels, true, true, ids_dtype, false, false);
  p.rows = call.args;
  const int64_t n = call.args.n;
  const Tensor replaced =
      corrupt_p > 0 ? empty_rows(z, z.dim() - 1, 0, ScalarType::Bool) : empty(z, {0}, ScalarType::Bool);
  const std::tuple<Tensor, Tensor, Tensor> results{call.codes, call.ids, replaced};
  if (n == 0) return results;
  if (drop_p == 0 && corrupt_p == 0) {
    FLEXKERNELS_LAUNCH(fsq_quantize, call.args, z, n, call.args.dims);
    return results;
  }
  p.replaced = corrupt_p > 0 ? static_cast<uint8_t*>(replaced.mutable_data_ptr()) : nullptr;
  p.sample = data_of(sample);
  p.wide_sample = sample && sample->scalar_type() == ScalarType::Long;
  p.rows_per_sample = n / z.size(0);
  const OptionalTensor smooth = !kCuda && drop_p > 0 ? OptionalTensor(bounded(call)) : std::nullopt;
  p.bounded = static_cast<const float*>(data_of(smooth));
  FLEXKERNELS_LAUNCH(fsq_train, p, z, n, 8 * call.args.dims);
  return results;
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) { m.impl("fsq_quantize_train", TORCH_BOX(&flexkernels::fsq_quantize_train)); }
