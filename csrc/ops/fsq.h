// What the FSQ ops share: checks of levels and ids, and the tables of a level set.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <mutex>
#include <vector>

#include "../core/fsq.h"
#include "op.h"

namespace flexkernels {

using Levels = std::vector<int64_t>;

inline int checked_dims(const Levels& levels) {
  STD_TORCH_CHECK(!levels.empty() && levels.size() <= kFsqMaxDims, "levels must have 1 to ", kFsqMaxDims,
                  " entries, got ", levels.size());
  for (const int64_t level : levels) {
    STD_TORCH_CHECK(level >= 2 && level <= kFsqMaxLevel, "levels must lie between 2 and ", kFsqMaxLevel, ", got ",
                    level);
  }
  return static_cast<int>(levels.size());
}

inline IdType checked_id_type(const char* name, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::UInt16, name,
                  " must be int64, int32 or uint16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Long ? IdType::i64 : type == ScalarType::Int ? IdType::i32 : IdType::u16;
}

// basis[d] = product of the levels before d; returns the product of all, which ids of the type must hold
inline int64_t checked_codebook(const Levels& levels, IdType type, int64_t* basis) {
  const int64_t limit = type == IdType::i64 ? INT64_MAX : type == IdType::i32 ? INT32_MAX : UINT16_MAX + 1;
  int64_t product = 1;
  for (size_t d = 0; d < levels.size(); ++d) {
    basis[d] = product;
    STD_TORCH_CHECK(product <= limit / levels[d], "levels must multiply to at most ", limit, ", got more");
    product *= levels[d];
  }
  return product;
}

// every value of a contiguous tensor lies in [low, high]; on a GPU looked at on request
template <typename T>
void check_values(const char* name, const Tensor& t, int64_t low, int64_t high) {
  if (!values_are_checked() || t.numel() == 0) return;
  const Tensor host = on_host(t);
  const T* values = read<T>(host);
  T least = values[0], most = values[0];
  for (int64_t i = 1; i < host.numel(); ++i) {
    least = std::min(least, values[i]);
    most = std::max(most, values[i]);
  }
  STD_TORCH_CHECK(static_cast<int64_t>(least) >= low && static_cast<int64_t>(most) <= high, name, " must lie between ",
                  low, " and ", high, ", got ", least, " to ", most);
}

inline void check_ids(const Tensor& ids, IdType type, int64_t codebook) {
  with_id(type, [&](auto id) { check_values<decltype(id)>("ids", ids, 0, codebook - 1); });
}

// thresholds float32 [dims, width] and codes float32 [dims, width + 1] (none where they follow from a division), of a
// level set and a form, on one device
struct FsqTables {
  Levels levels;
  bool symmetric, clamp;
  int32_t device;
  Tensor thresholds, host_thresholds;
  OptionalTensor codes;
  Tensor shift;  // float32 [dims] in the host's memory: what tanh takes is z + shift

  int width() const { return static_cast<int>(*std::max_element(levels.begin(), levels.end())) - 1; }
};

// Python finds them, by the formula in PyTorch. They are kept for good: captured CUDA graphs read them.
inline const FsqTables& fsq_tables(const Levels& levels, bool symmetric, bool clamp, const Tensor& like) {
  static std::mutex mutex;
  static auto* const known = new std::deque<FsqTables>;
  const int32_t device = kCuda ? like.get_device_index() : 0;
  const auto find = [&]() -> const FsqTables* {
    for (const FsqTables& t : *known) {
      if (t.symmetric == symmetric && t.clamp == clamp && t.device == device && t.levels == levels) return &t;
    }
    return nullptr;
  };
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const FsqTables* found = find()) return *found;
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(levels), torch::stable::detail::from(symmetric),
                                    torch::stable::detail::from(clamp)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("flexkernels::fsq_tables", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor thresholds = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor codes = torch::stable::detail::to<Tensor>(stack[1]);
  const Tensor shift = torch::stable::detail::to<Tensor>(stack[2]);
  const auto here = [&](const Tensor& t) { return on_device_of(like, t); };
  FsqTables made{levels, symmetric, clamp, device, here(thresholds), thresholds, std::nullopt, shift};
  if (codes.numel() > 0) made.codes = here(codes);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const FsqTables* found = find()) return *found;
  return known->emplace_back(std::move(made));
}

// a result of the first `dim` dimensions of `like`, then one of `last` where that is not 0
inline Tensor empty_rows(const Tensor& like, int64_t dim, int64_t last, ScalarType type) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().begin() + dim);
  if (last > 0) sizes.push_back(last);
  return empty(like, sizes.data(), static_cast<int64_t>(sizes.size()), type);
}

// z checked, results made (empty where not wanted), and what kernels take of them; without rows args.n is 0
struct FsqCall {
  FsqQuantize args;
  Tensor rows, codes, ids;
  const FsqTables* tables;
};

inline FsqCall fsq_call(const Tensor& z, const Levels& levels, bool codes, bool ids, ScalarType ids_dtype,
                        bool symmetric, bool clamp) {
  FsqQuantize p{};
  p.dims = checked_dims(levels);
  p.dtype = float_dtype("z", z);
  const int64_t dim = z.dim();
  STD_TORCH_CHECK(dim > 0 && z.size(dim - 1) == p.dims, "z must have shape [..., ", p.dims, "], got ", dim,
                  " dimensions and ", z.numel(), " elements");
  STD_TORCH_CHECK(codes || ids, "codes or ids must be asked for, got neither");
  p.id_type = checked_id_type("ids_dtype", ids_dtype);
  if (ids) p.codebook = checked_codebook(levels, p.id_type, p.basis);
  p.n = z.numel() / p.dims;
  const ScalarType type = z.scalar_type();
  FsqCall call{p, as_contiguous(z), codes ? empty_rows(z, dim, 0, type) : empty(z, {0}, type),
               ids ? empty_rows(z, dim - 1, 0, ids_dtype) : empty(z, {0}, ids_dtype), nullptr};
  if (p.n == 0) return call;
  call.tables = &fsq_tables(levels, symmetric, clamp, z);
  FsqQuantize& args = call.args;
  args.width = call.tables->width();
  std::copy(levels.begin(), levels.end(), args.levels);
  args.z = call.rows.const_data_ptr();
  args.thresholds = read<float>(call.tables->thresholds);
  args.host_thresholds = read<float>(call.tables->host_thresholds);
  args.table = static_cast<const float*>(data_of(call.tables->codes));
  args.codes = codes ? call.codes.mutable_data_ptr() : nullptr;
  args.ids = ids ? call.ids.mutable_data_ptr() : nullptr;
  return call;
}

}  // namespace flexkernels
