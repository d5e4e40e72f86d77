// The FSQ ops.
#include "fsq.h"

#include <tuple>

namespace flexkernels {
namespace {

// a result of the first `dim` dimensions of `like`, then one of `last` where that is not 0
Tensor empty_rows(const Tensor& like, int64_t dim, int64_t last, ScalarType type) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().begin() + dim);
  if (last > 0) sizes.push_back(last);
  return empty(like, sizes.data(), static_cast<int64_t>(sizes.size()), type);
}

std::tuple<Tensor, Tensor> fsq_quantize(const Tensor& z, const Levels& levels, bool codes, bool ids,
                                        ScalarType ids_dtype, bool symmetric, bool clamp) {
  FsqQuantize p{};
  p.dims = checked_dims(levels);
  p.dtype = float_dtype("z", z);
  const int64_t dim = z.dim();
  STD_TORCH_CHECK(dim > 0 && z.size(dim - 1) == p.dims, "z must have shape [..., ", p.dims, "], got ", dim,
                  " dimensions and ", z.numel(), " elements");
  STD_TORCH_CHECK(codes || ids, "codes or ids must be asked for, got neither");
  p.id_type = checked_id_type("ids_dtype", ids_dtype);
  if (ids) p.codebook = checked_codebook(levels, p.id_type, p.basis);
  const Tensor out_codes = codes ? empty_rows(z, dim, 0, z.scalar_type()) : empty(z, {0}, z.scalar_type());
  const Tensor out_ids = ids ? empty_rows(z, dim - 1, 0, ids_dtype) : empty(z, {0}, ids_dtype);
  p.n = z.numel() / p.dims;
  if (p.n == 0) return {out_codes, out_ids};
  const Tensor rows = as_contiguous(z);
  const FsqTables& tables = fsq_tables(levels, symmetric, clamp, z);
  p.width = tables.width();
  for (int d = 0; d < p.dims; ++d) p.half[d] = static_cast<int>(levels[d] / 2);
  p.z = rows.const_data_ptr();
  p.thresholds = read<float>(tables.thresholds);
  p.table = static_cast<const float*>(data_of(tables.codes));
  p.codes = codes ? out_codes.mutable_data_ptr() : nullptr;
  p.ids = ids ? out_ids.mutable_data_ptr() : nullptr;
  FLEXKERNELS_LAUNCH(fsq_quantize, p, z, p.n, p.dims);
  return {out_codes, out_ids};
}

Tensor fsq_dequantize(const Tensor& ids, const Levels& levels, ScalarType dtype, bool symmetric) {
  FsqDequantize p{};
  p.dims = checked_dims(levels);
  p.id_type = checked_id_type("ids", ids.scalar_type());
  p.codebook = checked_codebook(levels);
  p.dtype = float_dtype("dtype", dtype);
  const Tensor rows = as_contiguous(ids);
  if (kCuda) check_ids(rows, p.id_type, p.codebook);
  const Tensor out = empty_rows(ids, ids.dim(), p.dims, dtype);
  p.n = ids.numel();
  if (p.n == 0) return out;
  if (symmetric) {
    const FsqTables& tables = fsq_tables(levels, symmetric, false, ids);
    p.width = tables.width();
    p.table = static_cast<const float*>(data_of(tables.codes));
  }
  for (int d = 0; d < p.dims; ++d) p.levels[d] = static_cast<int>(levels[d]);
  p.ids = rows.const_data_ptr();
  p.codes = out.mutable_data_ptr();
  bool outside = false;
  p.outside = &outside;
  FLEXKERNELS_LAUNCH(fsq_dequantize, p, ids, p.n, p.dims);
  if (outside) check_ids(rows, p.id_type, p.codebook);
  return out;
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) {
  m.impl("fsq_quantize", TORCH_BOX(&flexkernels::fsq_quantize));
  m.impl("fsq_dequantize", TORCH_BOX(&flexkernels::fsq_dequantize));
}
