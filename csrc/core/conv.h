// Causal convolutions over [batch, frames, height, width, channels], channels last, in float32.
#pragma once

#include "dtype.h"

namespace flexkernels {

// How the products are formed (Cook-Toom, often called Winograd): a tile of outputs costs `alphas` products of channels
// in place of its size times the taps.
//   direct   every tap, tiles of 1
//   space    3 x 3 in space, tiles of 4 x 4: 36 products in place of 144
//   upsample the same behind a repetition of every pixel, 2 x 2 tiles: 9 in place of 36
//   time     3 in time, tiles of 4 frames: 6 in place of 12
enum class ConvKind : int { direct, space, upsample, time };

// output channels that the weights hold side by side
constexpr int kConvPanel = 16;

struct CausalConv {
  const float* x;         // [batch, frames, height, width, channels]
  const float* past;      // [batch, past_frames, height, width, channels], or null: zeros
  const float* weight;    // [panels, alphas, depth, kConvPanel]
  const float* bias;      // [phases * outputs] or null
  const float* residual;  // like out, or null
  float* out;             // [batch, phases * steps, out_height, out_width, outputs]
  int64_t batch, frames, height, width, channels, past_frames;
  int64_t steps, out_height, out_width, outputs;
  int64_t depth;                      // taps that are summed outside of the transform, times channels
  int64_t tiles_t, tiles_y, tiles_x;  // tiles of one clip
  int64_t tiles, block;               // of all clips; tiles that are done together
  int kt, kh, kw, time_stride, stride, phases, panels;
  ConvKind kind;
};

// silu(LN(x) * weight + bias) of rows; silu(y) = y / (1 + exp(-y))
struct NormSilu {
  const void* x;        // [rows, d]
  const float* weight;  // [d]
  const float* bias;    // [d]
  void* out;            // [rows, d]
  int64_t d;
  float eps;
  Dtype dtype;
};

}  // namespace flexkernels
