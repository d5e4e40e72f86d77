// The FSQ ops.
#include "fsq.h"

#include <tuple>

namespace flexkernels {
namespace {

std::tuple<Tensor, Tensor> fsq_quantize(const Tensor& z, const Levels& levels, bool codes, bool ids,
                                        ScalarType ids_dtype, bool symmetric, bool clamp) {
  const FsqCall call = fsq_call(z, levels, codes, ids, ids_dtype, symmetric, clamp);
  FLEXKERNELS_LAUNCH(fsq_quantize, call.args, z, call.args.n, call.args.dims);
  return {call.codes, call.ids};
}

Tensor fsq_dequantize(const Tensor& ids, const Levels& levels, ScalarType dtype, bool symmetric) {
  FsqDequantize p{};
  p.dims = checked_dims(levels);
  p.id_type = checked_id_type("ids", ids.scalar_type());
  // ids of a narrower type may be some of a larger codebook's
  int64_t basis[kFsqMaxDims];
  p.codebook = checked_codebook(levels, IdType::i64, basis);
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
  std::copy(levels.begin(), levels.end(), p.levels);
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
