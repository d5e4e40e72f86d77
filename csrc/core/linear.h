// A linear layer for few rows of x: every weight is read once.
#pragma once

#include "dtype.h"

namespace flexkernels {

constexpr int kSkinnyMaxRows = 16;

enum class WeightType : int { like_x, int8 };

struct SkinnyLinear {
  const void* x;         // [m, k], rows x_stride apart
  const void* weight;    // [n, k]; with swiglu n = 2 * outputs, [w1; w3]
  const float* scale;    // [n] or null: int8 weight only
  const void* bias;      // [n] or null, in x's dtype
  const void* residual;  // [m, outputs] or null, rows residual_stride apart
  const void* norm;      // GPU: [k] in x's dtype or null: x / sqrt(mean(x^2) + eps) * norm takes x's place
  void* out;             // [m, outputs]
  int64_t k, outputs, x_stride, residual_stride;
  float eps;  // of the norm
  int m;
  bool swiglu;
  // the kernel queued before this one does not write the weight, so it is read while that one runs
  bool constant_weight;
  Dtype dtype;  // of x and out
  WeightType weight_type;
};

}  // namespace flexkernels
