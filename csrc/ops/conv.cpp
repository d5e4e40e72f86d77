// The convolutions of a video codec, and the norm with SiLU before them.
#include "../core/conv.h"

#include <vector>

#include "op.h"

namespace flexkernels {
namespace {

struct Shape {
  ConvKind kind;
  int kt, kh, kw;
  int64_t time_stride, stride, phases, outputs;
};

constexpr int64_t kMostTaps = 16;
// products of a tile, its frames and its side, by ConvKind
constexpr int64_t kProducts[] = {1, 36, 9, 6}, kTileFrames[] = {1, 1, 1, 4}, kTileSide[] = {1, 4, 2, 1};
// what a thread keeps of the transformed inputs, about, and the fewest tiles worth reading the weights for
constexpr int64_t kBlockBytes = int64_t{2} << 20, kFewestTiles = 36, kMostTiles = 192;

Shape shape_of(int64_t kind, const std::vector<int64_t>& taps, int64_t time_stride, int64_t stride, int64_t phases,
               int64_t outputs) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 3, "kind must lie between 0 and 3, got ", kind);
  STD_TORCH_CHECK(taps.size() == 3, "taps must be (time, height, width), got ", taps.size(), " numbers");
  for (const int64_t n : taps) STD_TORCH_CHECK(n >= 1 && n <= kMostTaps, "taps must lie between 1 and 16, got ", n);
  STD_TORCH_CHECK(time_stride >= 1 && time_stride <= taps[0], "time_stride must lie between 1 and the taps in time, ",
                  taps[0], ", got ", time_stride);
  STD_TORCH_CHECK(stride >= 1 && stride <= kMostTaps, "stride must lie between 1 and 16, got ", stride);
  STD_TORCH_CHECK(phases >= 1 && phases <= kMostTaps, "phases must lie between 1 and 16, got ", phases);
  STD_TORCH_CHECK(outputs >= 1, "outputs must be at least 1, got ", outputs);
  return {static_cast<ConvKind>(kind),
          static_cast<int>(taps[0]),
          static_cast<int>(taps[1]),
          static_cast<int>(taps[2]),
          time_stride,
          stride,
          phases,
          outputs};
}

// no more tiles than fit, in blocks of about the same size, an even number of them for two threads
int64_t block_of(int64_t tiles, int64_t tile_bytes) {
  int64_t most = kBlockBytes / (tile_bytes + 1);
  most = most < kFewestTiles ? kFewestTiles : most > kMostTiles ? kMostTiles : most;
  int64_t blocks = (tiles + most - 1) / most;
  blocks += blocks & 1;
  return (tiles + blocks - 1) / blocks;
}

Tensor causal_conv(const Tensor& x, const Tensor& weight, OptionalTensor bias, OptionalTensor residual,
                   OptionalTensor past, int64_t kind, std::vector<int64_t> taps, int64_t time_stride, int64_t stride,
                   int64_t phases, int64_t outputs) {
  const Shape s = shape_of(kind, taps, time_stride, stride, phases, outputs);
  check_dim("x", x, 5);
  check_scalar_type("x", x, ScalarType::Float);
  CausalConv p{};
  p.kind = s.kind;
  p.batch = x.size(0), p.frames = x.size(1), p.height = x.size(2), p.width = x.size(3), p.channels = x.size(4);
  p.kt = s.kt, p.kh = s.kh, p.kw = s.kw;
  p.time_stride = static_cast<int>(time_stride), p.stride = static_cast<int>(stride);
  p.phases = static_cast<int>(phases);
  p.outputs = outputs;
  const bool upsample = s.kind == ConvKind::upsample, space = upsample || s.kind == ConvKind::space;
  STD_TORCH_CHECK(!space || (s.kh == 3 && s.kw == 3 && stride == 1), "kind must be 0 unless taps are 3 x 3 in space");
  STD_TORCH_CHECK(s.kind != ConvKind::time || (s.kt == 3 && s.kh == 1 && s.kw == 1 && time_stride == 1 && stride == 1),
                  "kind must be 0 unless taps are 3 in time");
  STD_TORCH_CHECK(p.frames % time_stride == 0, "x must have a multiple of ", time_stride, " frames, got ", p.frames);
  STD_TORCH_CHECK(p.height % stride == 0 && p.width % stride == 0, "x must have sides that are multiples of ", stride,
                  ", got ", p.height, " x ", p.width);
  p.steps = p.frames / time_stride;
  p.out_height = upsample ? 2 * p.height : p.height / stride;
  p.out_width = upsample ? 2 * p.width : p.width / stride;
  const int64_t outer = s.kind == ConvKind::direct ? int64_t{s.kt} * s.kh * s.kw : space ? s.kt : 1;
  p.depth = outer * p.channels;
  p.panels = static_cast<int>(phases * ((outputs + kConvPanel - 1) / kConvPanel));
  check_tensor("weight", weight, ScalarType::Float, {p.panels, kProducts[kind], p.depth, kConvPanel}, x);
  if (bias) check_tensor("bias", *bias, ScalarType::Float, {phases * outputs}, x);
  const Tensor out = empty(x, {p.batch, phases * p.steps, p.out_height, p.out_width, outputs}, ScalarType::Float);
  if (residual) check_like("residual", *residual, out);
  p.past_frames = s.kt - time_stride;
  if (past) {
    check_tensor("past", *past, ScalarType::Float, {p.batch, p.past_frames, p.height, p.width, p.channels}, x);
  }
  if (out.numel() == 0) return out;
  const Tensor inputs = as_contiguous(x), weights = as_contiguous(weight);
  const OptionalTensor biases = as_contiguous(bias), added = as_contiguous(residual), before = as_contiguous(past);
  p.x = read<float>(inputs);
  p.weight = read<float>(weights);
  p.bias = static_cast<const float*>(data_of(biases));
  p.residual = static_cast<const float*>(data_of(added));
  p.past = static_cast<const float*>(data_of(before));
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.tiles_t = (p.steps + kTileFrames[kind] - 1) / kTileFrames[kind];
  p.tiles_y = (p.out_height + kTileSide[kind] - 1) / kTileSide[kind];
  p.tiles_x = (p.out_width + kTileSide[kind] - 1) / kTileSide[kind];
  p.tiles = p.batch * p.tiles_t * p.tiles_y * p.tiles_x;
  p.block = block_of(p.tiles, kProducts[kind] * p.depth * static_cast<int64_t>(sizeof(float)));
  FLEXKERNELS_LAUNCH(causal_conv, p, x, (p.tiles + p.block - 1) / p.block, p.block * p.depth * outputs);
  return out;
}

Tensor norm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1, "x must have at least 1 dimension, got 0");
  check_eps(eps);
  const int64_t d = x.size(dim - 1);
  const Dtype dtype = float_dtype("x", x);
  check_tensor("weight", weight, ScalarType::Float, {d}, x);
  check_tensor("bias", bias, ScalarType::Float, {d}, x);
  const Tensor out = empty_like(x, x.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor rows = as_contiguous(x), weights = as_contiguous(weight), biases = as_contiguous(bias);
  NormSilu p{rows.const_data_ptr(),
             read<float>(weights),
             read<float>(biases),
             out.mutable_data_ptr(),
             d,
             static_cast<float>(eps),
             dtype};
  FLEXKERNELS_LAUNCH(norm_silu, p, x, out.numel() / d, d);
  return out;
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) {
  m.impl("causal_conv", TORCH_BOX(&flexkernels::causal_conv));
  m.impl("norm_silu", TORCH_BOX(&flexkernels::norm_silu));
}
