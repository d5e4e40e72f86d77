// The flow ops: schemas and CPU launches. Outputs are allocated by the caller; an op only fills them.
#include "flow.h"

#include "cpu.h"

namespace flexkernels {
namespace {

// offsets [rows + 1] must start at 0, never fall, and end at `total`
void check_offsets(const char* name, const int64_t* offsets, int64_t rows, int64_t total) {
  if (!offsets) return;
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[rows] == total, name, " must run from 0 to ", total, ", got ", offsets[0],
                  " to ", offsets[rows]);
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(offsets[r] <= offsets[r + 1], name, " must not fall, got ", offsets[r], " before ", offsets[r + 1]);
  }
}

void check_prefix_fits(const FlowUpdate& p) {
  if (!p.prefix) return;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t length = flow_row_begin(p, r + 1) - flow_row_begin(p, r);
    const int64_t given = p.prefix_offsets[r + 1] - p.prefix_offsets[r];
    STD_TORCH_CHECK(given <= length, "prefix_offsets must give row ", r, " at most its ", length, " elements, got ",
                    given);
  }
}

void flow_update_cpu(const Tensor& x, const Tensor& v_cond, OptionalTensor v_uncond, OptionalTensor momentum_buffer,
                     OptionalTensor row_offsets, OptionalTensor prefix, OptionalTensor prefix_offsets,
                     OptionalTensor prefix_noise, Tensors more_x, Tensors past, int64_t rows, Weights a, double b,
                     Weights past_b, int64_t guidance, double scale, double threshold, double eta, double momentum,
                     double rescale, double prefix_time, const Tensor& x_next, OptionalTensor momentum_next,
                     OptionalTensor velocity) {
  const FlowUpdate args = flow_update_args(x, v_cond, v_uncond, momentum_buffer, row_offsets, prefix, prefix_offsets,
                                           prefix_noise, more_x, past, rows, a, b, past_b, guidance, scale, threshold,
                                           eta, momentum, rescale, prefix_time, x_next, momentum_next, velocity);
  check_offsets("row_offsets", args.row_offsets, rows, x.numel());
  check_offsets("prefix_offsets", args.prefix_offsets, rows, prefix ? prefix->numel() : 0);
  check_prefix_fits(args);
  prefer_huge_pages(x_next);
  prefer_huge_pages(momentum_next);
  prefer_huge_pages(velocity);
  launch(FLEXKERNELS_SELECT(flow_update_kernel), args, rows, rows ? x.numel() / rows : 0);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "flow_update(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? momentum_buffer, Tensor? row_offsets, "
      "Tensor? prefix, Tensor? prefix_offsets, Tensor? prefix_noise, Tensor[] more_x, Tensor[] past, int rows, "
      "float[] a, float b, float[] past_b, int guidance, float scale, float threshold, float eta, float momentum, "
      "float rescale, float prefix_time, Tensor(a!) x_next, Tensor(b!)? momentum_next, Tensor(c!)? velocity) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("flow_update", TORCH_BOX(&flexkernels::flow_update_cpu));
}
