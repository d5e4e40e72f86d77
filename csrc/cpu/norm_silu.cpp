// A layer norm with weight and bias, and SiLU behind it: a row is read from memory once and written once.
#include "../core/conv.h"

#include <math.h>

#include "dispatch.h"
#include "exp.h"
#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

inline float lane_sum(vf v) {
  float sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += v[lane];
  return sum;
}

// body(i, io) over a row
template <typename Body>
inline __attribute__((always_inline)) void for_row(int64_t d, Body body) {
  int64_t i = 0;
  for (; i + W <= d; i += W) body(i, Full{});
  if (i < d) body(i, Part{static_cast<int>(d - i)});
}

template <typename X>
void norm_silu(const NormSilu& p, int64_t begin, int64_t end) {
  const int64_t d = p.d;
  const float *weight = p.weight, *bias = p.bias, eps = p.eps;
  // a row as float32, whole vectors
  float* row = new float[(d + W - 1) / W * W];
  for (int64_t r = begin; r < end; ++r) {
    const X* x = static_cast<const X*>(p.x) + r * d;
    X* out = static_cast<X*>(p.out) + r * d;
    vf sum = {};
    for_row(d, [&](int64_t i, auto io) {
      const vf v = io.load_from(x + i);
      store(row + i, v);
      sum += v;
    });
    const float mean = lane_sum(sum) / static_cast<float>(d);
    vf squares = {};
    int64_t i = 0;
    for (; i + W <= d; i += W) {
      const vf c = load(row + i) - mean;
      squares = fma(c, c, squares);
    }
    float rest = 0;
    for (; i < d; ++i) rest += (row[i] - mean) * (row[i] - mean);
    const float rstd = 1.0f / sqrtf((lane_sum(squares) + rest) / static_cast<float>(d) + eps);
    for_row(d, [&](int64_t j, auto io) {
      const vf y = fma((load(row + j) - mean) * rstd, io.load_from(weight + j), io.load_from(bias + j));
      vf e[1] = {-y};
      exp_vfs<1>(e);
      io.store_to(out + j, y / (1.0f + e[0]));
    });
  }
  delete[] row;
}

}  // namespace

void norm_silu_kernel(const NormSilu& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto x) { norm_silu<decltype(x)>(p, begin, end); });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
