// Row norms between residual blocks, and the gated linear unit.
//   sum = x + gate[s] * y,   out = (sum - mean) * rstd * (1 + scale[s]) + shift[s],   s = segment[row]
//   rms: mean = 0 and the factor is scale itself
// Everything is float32 inside; a result is rounded once, and out follows from the rounded sum.
#pragma once

#include "dtype.h"

namespace flexkernels {

enum NormKind : int { kLayerNorm = 0, kRmsNorm = 1 };

// columns of one item of norm_sums on the CPU
constexpr int64_t kNormColumns = 1024;
// rows of one run of a backward on the CPU: short, so that long sums stay accurate
constexpr int64_t kNormRows = 16;
// the rows of a backward on a GPU are split into runs, at most so many: a few for each multiprocessor, and the same on
// every GPU, so that sums are too
constexpr int64_t kNormRuns = 264;

// rows of modulation, [segments, d] with any stride from row to row; data is null when absent
struct NormTable {
  const void* data;
  int64_t stride;
};

struct NormForward {
  const void* x;  // [n, d], rows x_stride apart
  const void* y;  // [n, d], rows y_stride apart, or null
  NormTable gate, shift, scale;
  const int32_t* segment;  // [n] or null: all rows take table row 0
  void* sum;               // [n, d] or null
  void* out;               // [n, d] or null: no norm
  int64_t n, d, x_stride, y_stride, segments;
  float eps;
  int kind;
  Dtype dtype;        // of x, y, sum, out
  Dtype table_dtype;  // dtype or f32
  bool past_cache;    // CPU: what is read and written exceeds the caches
};

// dv = grad_sum + (d out / d sum)^T grad_out;  grad_x = dv,  grad_y = gate[s] * dv
struct NormBackward {
  const void* grad_out;  // [n, d], or null: dv = grad_sum
  const void* grad_sum;  // [n, d] or null
  const void* v;         // [n, d], what was normalised; null without grad_out
  NormTable gate, scale;
  const int32_t* segment;
  void* grad_x;  // [n, d] or null
  void* grad_y;  // [n, d] or null
  float* stats;  // GPU: [n, 2], mean and rstd of every row, or null
  int64_t n, d, segments;
  float eps;
  int kind;
  Dtype dtype, table_dtype;
  bool past_cache;  // CPU, as above
};

// over the rows of each segment: grad_gate = sum dv * y, grad_shift = sum grad_out, grad_scale = sum grad_out * xhat
// Rows are taken in `order`, a run of them at a time. What a run adds to a segment goes to slot run + segment of
// `partial`: no two share one, since along the rows the run or the segment rises. Slots are then added in their order.
struct NormSums {
  const void* grad_out;  // [n, d] or null
  const void* dv;        // [n, d] or null
  const void* v;         // [n, d] or null
  const void* y;         // [n, d] or null
  const float* stats;    // GPU: [n, 2] or null
  const int32_t* segment;
  const int64_t* order;                       // [n]: rows by segment, or null: as they are
  const int64_t* offsets;                     // [segments + 1]: where a segment begins in `order`; null for one segment
  void *grad_gate, *grad_shift, *grad_scale;  // [segments, d] or null
  float* partial;                             // [3, runs + segments, d]: gate, shift, scale; null: no sums
  int64_t n, d, segments;
  Dtype dtype, sum_dtype;  // sum_dtype: of grad_gate, grad_shift and grad_scale, dtype or f32 (CPU: f32)
};

// where segment s begins in the order
FLEXKERNELS_HD int64_t norm_begin(const NormSums& p, int64_t s) { return p.offsets ? p.offsets[s] : s * p.n; }

// GPU: fills `order` and `offsets` of NormSums
struct SegmentOrder {
  const int32_t* segment;  // [n]
  int64_t *order, *spare;  // [n]
  int64_t* offsets;        // [segments + 1]
  int64_t n, segments;
};

// rows of one run
FLEXKERNELS_HD int64_t norm_run(int64_t n) { return n > kNormRuns ? (n + kNormRuns - 1) / kNormRuns : 1; }

FLEXKERNELS_HD int64_t norm_row(const NormSums& s, int64_t i) { return s.order ? s.order[i] : i; }

// `which`: 0 gate, 1 shift, 2 scale
FLEXKERNELS_HD float* norm_slot(const NormSums& s, int which, int64_t run, int64_t segment, int64_t runs) {
  return s.partial + (which * (runs + s.segments) + run + segment) * s.d;
}

// what norm_backward computes
struct NormGradients {
  NormBackward rows;
  NormSums sums;
};

struct Swiglu {
  const void* x;         // [n, 2 h], rows x_stride apart
  const void* grad_out;  // [n, h]; backward alone
  void* out;             // [n, h], or the gradient of x [n, 2 h]
  int64_t n, h, x_stride;
  Dtype dtype;
};

FLEXKERNELS_HD int64_t norm_segment(const int32_t* segment, int64_t row, int64_t segments) {
  if (!segment) return 0;
  const int64_t s = segment[row];
  return s < 0 ? 0 : s < segments ? s : segments - 1;
}

}  // namespace flexkernels
