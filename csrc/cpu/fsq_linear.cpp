// FSQ next to its linear layers, on vectors along the width.
#include "../core/fsq_linear.h"

#include "dispatch.h"
#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

inline float sum_lanes(vf v) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 parts[W / 4];
  memcpy(parts, &v, sizeof v);
  for (int i = 1; i < W / 4; ++i) parts[0] += parts[i];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

// rows and dimensions that share one walk over the width: their sums fill the registers
constexpr int kRows = W == 16 ? 4 : 2;
constexpr int kDims = 6;

template <typename T>
inline float row_mean(const T* x, int64_t width) {
  vf sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * W <= width; j += 4 * W) {
    for (int s = 0; s < 4; ++s) sums[s] += load(x + j + s * W);
  }
  for (; j + W <= width; j += W) sums[0] += load(x + j);
  float sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < width; ++j) sum += to_float(x[j]);
  return sum / static_cast<float>(width);
}

// squares[r] = |x_r - mean_r|^2 and dots[r][d] = weight_d . (x_r - mean_r)
template <typename T, int R, int D>
inline void project_tile(const T* x, const float* mean, const float* weight, int64_t width, float* squares,
                         float (*dots)[kDims]) {
  vf square[R] = {}, dot[R][D] = {};
  int64_t j = 0;
  for (; j + W <= width; j += W) {
    vf centred[R];
    for (int r = 0; r < R; ++r) {
      centred[r] = load(x + r * width + j) - mean[r];
      square[r] = fma(centred[r], centred[r], square[r]);
    }
    for (int d = 0; d < D; ++d) {
      const vf w = load(weight + d * width + j);
      for (int r = 0; r < R; ++r) dot[r][d] = fma(w, centred[r], dot[r][d]);
    }
  }
  for (int r = 0; r < R; ++r) {
    squares[r] = sum_lanes(square[r]);
    for (int d = 0; d < D; ++d) dots[r][d] = sum_lanes(dot[r][d]);
    for (int64_t k = j; k < width; ++k) {
      const float centred = to_float(x[r * width + k]) - mean[r];
      squares[r] += centred * centred;
      for (int d = 0; d < D; ++d) dots[r][d] += weight[d * width + k] * centred;
    }
  }
}

template <typename T, int R, int D = kDims>
inline void project_dims(int dims, const T* x, const float* mean, const float* weight, int64_t width, float* squares,
                         float (*dots)[kDims]) {
  if (dims == D) return project_tile<T, R, D>(x, mean, weight, width, squares, dots);
  if constexpr (D > 1) project_dims<T, R, D - 1>(dims, x, mean, weight, width, squares, dots);
}

template <typename T>
void write_row(const FsqProject& p, int64_t row, const float* z) {
  int64_t id = 0;
  for (int d = 0; d < p.dims; ++d) {
    const int level = fsq_level(p.thresholds + static_cast<int64_t>(d) * p.steps, p.steps, z[d]);
    if (p.codes) from_float(fsq_code(level, p.half[d]), static_cast<T*>(p.codes) + row * p.dims + d);
    id += level * p.basis[d];
  }
  if (p.ids) fsq_store_id(p.ids, p.id_type, row, id);
}

template <typename T, int R>
void project_block(const FsqProject& p, int64_t row) {
  const T* x = static_cast<const T*>(p.hidden) + row * p.width;
  float mean[R], squares[R], dots[R][kDims], z[R][kFsqMaxDims];
  for (int r = 0; r < R; ++r) mean[r] = row_mean(x + r * p.width, p.width);
  for (int first = 0; first < p.dims; first += kDims) {
    const int dims = p.dims - first < kDims ? p.dims - first : kDims;
    project_dims<T, R>(dims, x, mean, p.weight + first * p.width, p.width, squares, dots);
    for (int r = 0; r < R; ++r) {
      const float scale = 1.0f / __builtin_sqrtf(squares[r] / static_cast<float>(p.width) + p.eps);
      for (int d = 0; d < dims; ++d) z[r][first + d] = scale * dots[r][d] + (p.bias ? p.bias[first + d] : 0.0f);
    }
  }
  for (int r = 0; r < R; ++r) write_row<T>(p, row + r, z[r]);
}

template <typename T>
void project(const FsqProject& p, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) project_block<T, kRows>(p, row);
  for (; row < end; ++row) project_block<T, 1>(p, row);
}

template <typename T, typename IO>
inline void embed_vector(const FsqEmbed& p, const float* codes, const T* position, T* out, int64_t j, IO io) {
  vf sum = {};
  if (p.bias) sum = io.load_from(p.bias + j);
  for (int d = 0; d < p.dims; ++d) sum = fma(codes[d] + vf{}, io.load_from(p.weight + d * p.width + j), sum);
  if (position) sum += io.load_from(position + j);
  io.store_to(out + j, sum);
}

template <typename T>
void embed(const FsqEmbed& args, int64_t begin, int64_t end) {
  // a copy of our own: the compiler sees that stores to out cannot change it
  const FsqEmbed p = args;
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(p.out) + row * p.width;
    if (p.token_index && p.token_index[row] >= 0) {
      memcpy(out, static_cast<const T*>(p.tokens) + p.token_index[row] * p.width, p.width * sizeof(T));
      continue;
    }
    float codes[kFsqMaxDims];
    fsq_codes_of(p, row, codes);
    const int64_t at = p.position_index ? p.position_index[row] : row;
    const T* position = p.positions ? static_cast<const T*>(p.positions) + at * p.width : nullptr;
    int64_t j = 0;
    for (; j + W <= p.width; j += W) embed_vector(p, codes, position, out, j, Full{});
    if (j < p.width) embed_vector(p, codes, position, out, j, Part{static_cast<int>(p.width - j)});
  }
}

}  // namespace

void fsq_project_kernel(const FsqProject& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) { project<decltype(element)>(p, begin, end); });
}

void fsq_embed_kernel(const FsqEmbed& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) { embed<decltype(element)>(p, begin, end); });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
