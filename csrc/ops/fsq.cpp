// The FSQ ops: schemas and CPU launches. Outputs are allocated by the caller; an op only fills them.
#include "fsq.h"

#include "cpu.h"

namespace flexkernels {
namespace {

void fsq_quantize_cpu(const Tensor& z, const Tensor& thresholds, Levels levels, OptionalTensor codes,
                      OptionalTensor ids, OptionalTensor table) {
  const FsqQuantize args = fsq_quantize_args(z, thresholds, levels, codes, ids, table);
  prefer_huge_pages(codes);
  prefer_huge_pages(ids);
  launch(FLEXKERNELS_SELECT(fsq_quantize_kernel), args, args.n, args.dims);
}

void fsq_dequantize_cpu(const Tensor& ids, Levels levels, const Tensor& codes, OptionalTensor table) {
  const FsqDequantize args = fsq_dequantize_args(ids, levels, codes, table);
  prefer_huge_pages(codes);
  launch(FLEXKERNELS_SELECT(fsq_dequantize_kernel), args, args.n, args.dims);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "fsq_quantize(Tensor z, Tensor thresholds, int[] levels, Tensor(a!)? codes, Tensor(b!)? ids, Tensor? table=None) "
      "-> ()");
  m.def("fsq_dequantize(Tensor ids, int[] levels, Tensor(a!) codes, Tensor? table=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("fsq_quantize", TORCH_BOX(&flexkernels::fsq_quantize_cpu));
  m.impl("fsq_dequantize", TORCH_BOX(&flexkernels::fsq_dequantize_cpu));
}
