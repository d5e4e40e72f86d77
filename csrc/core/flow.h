// One guided Euler step of a flow ODE: x + dt * v with v = alpha * v_cond + beta * d, d = v_cond - v_uncond.
#pragma once

#include <math.h>

#include "dtype.h"

namespace flexkernels {

enum FlowGuidance : int { kFlowNone = 0, kFlowCFG = 1, kFlowAPG = 2 };

struct FlowStep {
  const void* x;                  // [total]
  const void* v_cond;             // [total]
  const void* v_uncond;           // [total] or null
  const float* momentum_buffer;   // [total] or null
  const int64_t* row_offsets;     // [rows + 1] or null: rows of row_length
  const float* prefix;            // flat, or null
  const int64_t* prefix_offsets;  // [rows + 1]
  const float* prefix_noise;      // like prefix, or null
  void* x_next;                   // [total]
  float* momentum_next;           // [total] or null
  int64_t rows, row_length;       // row_length: the mean one when row_offsets is given
  int guidance;
  float dt, scale, threshold, eta, momentum, prefix_time;
  Dtype x_dtype, v_dtype;
};

template <typename Real>
struct FlowCoefficients {
  Real alpha, beta;
};

FLEXKERNELS_HD int64_t flow_row_begin(const FlowStep& p, int64_t row) {
  return p.row_offsets ? p.row_offsets[row] : row * p.row_length;
}

// APG of one row from its sums dd = d.d, dc = d.v_cond, cc = v_cond.v_cond:
//   d *= k, k = min(1, threshold / |d|);  d_par = a * v_cond, a = k dc / max(|v_cond|, 1e-12)^2
//   v = v_cond + (scale - 1) (d - d_par + eta d_par)
// A NaN in a row spreads over the row, as it does in the formula.
template <typename Real>
FLEXKERNELS_HD FlowCoefficients<Real> flow_apg(const FlowStep& p, Real dd, Real dc, Real cc) {
  Real k = 1;
  if (p.threshold > 0) {
    const Real ratio = p.threshold / sqrt(dd);
    k = ratio >= 1 ? Real(1) : ratio;
  }
  const Real norm = sqrt(cc) < Real(1e-12) ? Real(1e-12) : sqrt(cc);
  const Real a = k * (dc / norm / norm);
  const Real gain = Real(p.scale) - 1;
  return {1 + gain * (Real(p.eta) - 1) * a, gain * k};
}

template <typename Real>
FLEXKERNELS_HD FlowCoefficients<Real> flow_plain(const FlowStep& p) {
  return {Real(1), p.guidance == kFlowCFG ? Real(p.scale) - 1 : Real(0)};
}

FLEXKERNELS_HD float flow_prefix(const FlowStep& p, int64_t i) {
  if (!p.prefix_noise) return p.prefix[i];
  return (1.0f - p.prefix_time) * p.prefix[i] + p.prefix_time * p.prefix_noise[i];
}

}  // namespace flexkernels
