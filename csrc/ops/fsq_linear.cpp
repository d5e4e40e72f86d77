// The FSQ ops with linear layers: schemas and CPU launches. Outputs are allocated by the caller; an op only fills them.
#include "fsq_linear.h"

#include "cpu.h"

namespace flexkernels {
namespace {

void fsq_project_cpu(const Tensor& hidden, const Tensor& weight, OptionalTensor bias, const Tensor& thresholds,
                     Levels levels, double eps, OptionalTensor codes, OptionalTensor ids) {
  const FsqProject args = fsq_project_args(hidden, weight, bias, thresholds, levels, eps, codes, ids);
  launch(FLEXKERNELS_SELECT(fsq_project_kernel), args, args.n, args.width);
}

void check_index(const char* name, const int32_t* index, int64_t n, int64_t low, int64_t rows) {
  for (int64_t i = 0; index && i < n; ++i) {
    STD_TORCH_CHECK(index[i] >= low && index[i] < rows, name, " must lie between ", low, " and ", rows - 1, ", got ",
                    index[i]);
  }
}

void fsq_embed_cpu(const Tensor& ids, Levels levels, const Tensor& weight, OptionalTensor bias,
                   OptionalTensor positions, OptionalTensor position_index, OptionalTensor tokens,
                   OptionalTensor token_index, const Tensor& out) {
  const FsqEmbed args = fsq_embed_args(ids, levels, weight, bias, positions, position_index, tokens, token_index, out);
  check_index("position_index", args.position_index, args.n, 0, positions ? positions->size(0) : 0);
  check_index("token_index", args.token_index, args.n, INT32_MIN, tokens ? tokens->size(0) : 0);
  prefer_huge_pages(out);
  launch(FLEXKERNELS_SELECT(fsq_embed_kernel), args, args.n, args.width);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "fsq_project_quantize(Tensor hidden, Tensor weight, Tensor? bias, Tensor thresholds, int[] levels, float eps, "
      "Tensor(a!)? codes, Tensor(b!)? ids) -> ()");
  m.def(
      "fsq_embed(Tensor ids, int[] levels, Tensor weight, Tensor? bias, Tensor? positions, Tensor? position_index, "
      "Tensor? tokens, Tensor? token_index, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("fsq_project_quantize", TORCH_BOX(&flexkernels::fsq_project_cpu));
  m.impl("fsq_embed", TORCH_BOX(&flexkernels::fsq_embed_cpu));
}
