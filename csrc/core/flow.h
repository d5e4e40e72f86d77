// One guided update of a flow ODE: x_next = sum a_i x_i + b v + sum past_b_j past_j, with the guided velocity
// v = alpha * v_cond + beta * d, d = v_cond - v_uncond (+ momentum * buffer), alpha and beta constant in a row.
#pragma once

#include <math.h>

#include "dtype.h"

namespace flexkernels {

enum FlowGuidance : int { kFlowNone = 0, kFlowCFG = 1, kFlowAPG = 2 };

// the most states and the most past velocities
constexpr int kFlowMaxTerms = 3;

// what FlowUpdate::scalars holds, one after the other: a, b, past_b, scale, prefix_time
enum FlowScalar : int {
  kFlowA = 0,
  kFlowB = kFlowMaxTerms,
  kFlowPastB,
  kFlowScale = kFlowPastB + kFlowMaxTerms,
  kFlowPrefixTime,
  kFlowScalars
};

struct FlowUpdate {
  const void* x[kFlowMaxTerms];      // [total] each
  const float* past[kFlowMaxTerms];  // [total] each
  float a[kFlowMaxTerms], past_b[kFlowMaxTerms];
  int states, pasts;
  const void* v_cond;             // [total]
  const void* v_uncond;           // [total] or null
  const float* momentum_buffer;   // [total] or null
  const int64_t* row_offsets;     // [rows + 1] or null: rows of row_length
  const float* prefix;            // flat, or null
  const int64_t* prefix_offsets;  // [rows + 1] or null: prefix_length in each row
  const float* prefix_noise;      // like prefix, or null
  const float* scalars;           // [kFlowScalars], which stand for the members of their names, or null
  void* x_next;                   // [total], may be x[0]
  float* momentum_next;           // [total] or null
  float* velocity;                // [total] or null
  int64_t rows, row_length;       // row_length: the mean one when row_offsets is given
  int64_t prefix_length;
  int guidance;
  float b, scale, threshold, eta, momentum, rescale, prefix_time;
  Dtype x_dtype, v_dtype;
};

FLEXKERNELS_HD float flow_a(const FlowUpdate& p, int state) {
  return p.scalars ? p.scalars[kFlowA + state] : p.a[state];
}

FLEXKERNELS_HD float flow_b(const FlowUpdate& p) { return p.scalars ? p.scalars[kFlowB] : p.b; }

FLEXKERNELS_HD float flow_past_b(const FlowUpdate& p, int past) {
  return p.scalars ? p.scalars[kFlowPastB + past] : p.past_b[past];
}

FLEXKERNELS_HD float flow_scale(const FlowUpdate& p) { return p.scalars ? p.scalars[kFlowScale] : p.scale; }

FLEXKERNELS_HD float flow_prefix_time(const FlowUpdate& p) {
  return p.scalars ? p.scalars[kFlowPrefixTime] : p.prefix_time;
}

template <typename Real>
struct FlowCoefficients {
  Real alpha, beta;
};

FLEXKERNELS_HD int64_t flow_row_begin(const FlowUpdate& p, int64_t row) {
  return p.row_offsets ? p.row_offsets[row] : row * p.row_length;
}

FLEXKERNELS_HD int64_t flow_prefix_begin(const FlowUpdate& p, int64_t row) {
  return p.prefix_offsets ? p.prefix_offsets[row] : row * p.prefix_length;
}

// whether alpha and beta depend on sums over the row
FLEXKERNELS_HD bool flow_needs_sums(const FlowUpdate& p) {
  return p.guidance == kFlowAPG || (p.guidance == kFlowCFG && p.rescale > 0);
}

// APG of one row from its sums dd = d.d, dc = d.v_cond, cc = v_cond.v_cond:
//   d *= k, k = min(1, threshold / |d|);  d_par = a * v_cond, a = k dc / max(|v_cond|, 1e-12)^2
//   v = v_cond + (scale - 1) (d - d_par + eta d_par)
// A NaN in a row spreads over the row, as it does in the formula.
template <typename Real>
FLEXKERNELS_HD FlowCoefficients<Real> flow_apg(const FlowUpdate& p, Real dd, Real dc, Real cc) {
  Real k = 1;
  if (p.threshold > 0) {
    const Real ratio = p.threshold / sqrt(dd);
    k = ratio >= 1 ? Real(1) : ratio;
  }
  const Real norm = sqrt(cc) < Real(1e-12) ? Real(1e-12) : sqrt(cc);
  const Real a = k * (dc / norm / norm);
  const Real gain = Real(flow_scale(p)) - 1;
  return {1 + gain * (Real(p.eta) - 1) * a, gain * k};
}

template <typename Real>
FLEXKERNELS_HD FlowCoefficients<Real> flow_plain(const FlowUpdate& p) {
  return {Real(1), p.guidance == kFlowCFG ? Real(flow_scale(p)) - 1 : Real(0)};
}

// CFG with rescale of one row of n, from sums over c = v_cond - v_cond[0] and g = v - v[0], v the velocity of plain
// CFG: v *= rescale * std(c) / std(g) + 1 - rescale. Taking the first element off keeps the squares free of the mean.
template <typename Real>
FLEXKERNELS_HD FlowCoefficients<Real> flow_rescaled(const FlowUpdate& p, Real n, Real c, Real cc, Real g, Real gg) {
  const Real varies_c = cc - c * (c / n), varies_g = gg - g * (g / n);
  const Real ratio = varies_g <= 0 ? Real(1) : varies_c <= 0 ? Real(0) : sqrt(varies_c / varies_g);
  const Real factor = p.rescale * ratio + (1 - Real(p.rescale));
  return {factor, factor * (Real(flow_scale(p)) - 1)};
}

FLEXKERNELS_HD float flow_prefix(const FlowUpdate& p, int64_t i) {
  if (!p.prefix_noise) return p.prefix[i];
  const float time = flow_prefix_time(p);
  return (1.0f - time) * p.prefix[i] + time * p.prefix_noise[i];
}

}  // namespace flexkernels
