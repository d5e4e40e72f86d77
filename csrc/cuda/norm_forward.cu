// Row norms, forward, by one of two kernels that differ in the order of their sums, chosen by width and dtypes alone:
// packed, where a row is whole packs of 16 bytes and its tables share its dtype: a warp or four hold a row in
// registers, and all its loads are under way before the first is used; any, for everything else: a block a row, which
// it reads again for each of its three passes.
#include "norm.h"
#include "norm_row.h"

namespace flexkernels::cuda {
namespace {

// for sm_100 ptxas takes more registers for the same
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kOneWarpBlocks = 8;
#else
constexpr int kOneWarpBlocks = 10;
#endif

// W warps a row, K packs a lane, R rows a block (more than one only where W is 1)
struct OneWarp {
  static constexpr int W = 1, K = kWarpPacks, R = 2, kAhead = 2, kBlocks = kOneWarpBlocks;
};
struct FourWarps {
  static constexpr int W = 4, K = 8, R = 1, kAhead = 3, kBlocks = 4;
};

template <typename Shape, typename X>
constexpr int64_t kMaxPacked = Shape::W * Shape::K * 32 * kPack<X>;

template <typename T>
__device__ __forceinline__ uint4 load_table(const T* row, int pack) {
  return ptx::load_constant(row + static_cast<int64_t>(pack) * kPack<T>);
}

// Y: 0 no residual, 1 x + y, 2 x + gate * y. A branch for each pack would make ptxas wait for one load after the other,
// so what is absent is known at compile time or read from zeros, and lanes beyond the row take its last pack again.
// Packed values are hidden from the compiler between passes: it would keep them unpacked, in twice the registers.
template <typename X, typename Shape, int Y, bool RMS>
__global__ void __launch_bounds__(32 * Shape::W * Shape::R, Shape::kBlocks)
    packed_kernel(const __grid_constant__ NormForward p) {
  constexpr int N = kPack<X>, W = Shape::W, K = Shape::K, R = Shape::R, H = Shape::kAhead;
  __shared__ float means[W][1], variances[W][1];
  const int lane = threadIdx.x % (32 * W), packs = static_cast<int>(p.d / N);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * R + threadIdx.x / (32 * W);
  if (R > 1 && row >= p.n) return;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t s = norm_segment(p.segment, row, p.segments);
  const auto inside = [&](int k) { return k * 32 * W + lane < packs; };
  const auto pack_of = [&](int k) { return inside(k) ? k * 32 * W + lane : packs - 1; };
  const X* x = static_cast<const X*>(p.x) + row * p.x_stride;
  uint4 v[K], y[Y ? K : 1], gates[Y == 2 ? K : 1], scales[K], shifts[RMS ? 1 : K];
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = ptx::load_constant_once(x + static_cast<int64_t>(pack_of(k)) * N);
  if constexpr (Y != 0) {
    const X* from = static_cast<const X*>(p.y) + row * p.y_stride;
#pragma unroll
    for (int k = 0; k < K; ++k) y[k] = ptx::load_constant_once(from + static_cast<int64_t>(pack_of(k)) * N);
  }
  const X* gate = table_or_zeros<X>(p.gate, s);
  if constexpr (Y == 2) {
#pragma unroll
    for (int k = 0; k < H; ++k) gates[k] = load_table(gate, pack_of(k));
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if constexpr (Y != 0) {
      float a[N], b[N];
      unpack<X>(v[k], a);
      unpack<X>(y[k], b);
      if constexpr (Y == 2) {
        if (k + H < K) gates[k + H < K ? k + H : 0] = load_table(gate, pack_of(k + H));
        float by[N];
        unpack<X>(gates[k], by);
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] = fmaf(by[j], b[j], a[j]);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] += b[j];
      }
      // the norm takes the rounded sum
      v[k] = pack<X>(a);
      if (inside(k)) {
        *reinterpret_cast<uint4*>(static_cast<X*>(p.sum) + row * p.d + static_cast<int64_t>(pack_of(k)) * N) = v[k];
      }
    }
    if (!inside(k)) v[k] = make_uint4(0, 0, 0, 0);
  }
  if (!p.out) return;

  const X *scale = table_or_zeros<X>(p.scale, s), *shift = table_or_zeros<X>(p.shift, s);
#pragma unroll
  for (int k = 0; k < H; ++k) {
    scales[k] = load_table(scale, pack_of(k));
    if constexpr (!RMS) shifts[k] = load_table(shift, pack_of(k));
  }
  const float per = 1.0f / static_cast<float>(p.d);
  float mean[1] = {0}, squares[1] = {0};
  if constexpr (!RMS) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float a[N];
      unpack<X>(v[k], a);
#pragma unroll
      for (int j = 0; j < N; ++j) mean[0] += a[j];
    }
    block_sums<1>(mean, means, W);
    mean[0] *= per;
#pragma unroll
    for (int k = 0; k < K; ++k) ptx::keep(v[k]);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float a[N], part = 0;
    unpack<X>(v[k], a);
#pragma unroll
    for (int j = 0; j < N; ++j) part = fmaf(a[j] - mean[0], a[j] - mean[0], part);
    squares[0] += inside(k) ? part : 0.0f;
  }
  block_sums<1>(squares, variances, W);
  const float rstd = 1.0f / sqrtf(squares[0] * per + p.eps);
#pragma unroll
  for (int k = 0; k < K; ++k) ptx::keep(v[k]);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float a[N], by[N], add[N] = {};
    if (k + H < K) {
      scales[k + H < K ? k + H : 0] = load_table(scale, pack_of(k + H));
      if constexpr (!RMS) shifts[k + H < K ? k + H : 0] = load_table(shift, pack_of(k + H));
    }
    unpack<X>(v[k], a);
    unpack<X>(scales[k], by);
    if constexpr (!RMS) unpack<X>(shifts[k], add);
#pragma unroll
    for (int j = 0; j < N; ++j) a[j] = fmaf((a[j] - mean[0]) * rstd, RMS ? by[j] : 1.0f + by[j], add[j]);
    if (inside(k)) {
      *reinterpret_cast<uint4*>(static_cast<X*>(p.out) + row * p.d + static_cast<int64_t>(pack_of(k)) * N) = pack<X>(a);
    }
  }
}

constexpr int kAnyThreads = 256;

// any width, alignment and choice of tables; M is the tables' dtype
template <typename X, typename M>
__global__ void __launch_bounds__(kAnyThreads) any_kernel(const __grid_constant__ NormForward p) {
  __shared__ float means[kAnyThreads / 32][1], variances[kAnyThreads / 32][1];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t row = blockIdx.x, s = norm_segment(p.segment, row, p.segments);
  const X *x = static_cast<const X*>(p.x) + row * p.x_stride, *v = x;
  const M *gate = table_row<M>(p.gate, s), *scale = table_row<M>(p.scale, s), *shift = table_row<M>(p.shift, s);
  const float per = 1.0f / static_cast<float>(p.d);
  float mean[1] = {0}, squares[1] = {0};
  if (p.y) {
    const X* y = static_cast<const X*>(p.y) + row * p.y_stride;
    X* sum = static_cast<X*>(p.sum) + row * p.d;
    for (int64_t i = threadIdx.x; i < p.d; i += kAnyThreads) {
      const float added = to_float(y[i]), to = to_float(x[i]);
      from_float(gate ? fmaf(to_float(gate[i]), added, to) : to + added, &sum[i]);
    }
    // each thread reads what it wrote itself
    v = sum;
  }
  if (!p.out) return;
  if (p.kind == kLayerNorm) {
    for (int64_t i = threadIdx.x; i < p.d; i += kAnyThreads) mean[0] += to_float(v[i]);
    block_sums<1>(mean, means, kAnyThreads / 32);
    mean[0] *= per;
  }
  for (int64_t i = threadIdx.x; i < p.d; i += kAnyThreads) {
    const float c = to_float(v[i]) - mean[0];
    squares[0] = fmaf(c, c, squares[0]);
  }
  block_sums<1>(squares, variances, kAnyThreads / 32);
  const float rstd = 1.0f / sqrtf(squares[0] * per + p.eps), one = p.kind == kLayerNorm ? 1.0f : 0.0f;
  X* out = static_cast<X*>(p.out) + row * p.d;
  for (int64_t i = threadIdx.x; i < p.d; i += kAnyThreads) {
    const float normed = (to_float(v[i]) - mean[0]) * rstd;
    from_float(fmaf(normed, scale ? one + to_float(scale[i]) : 1.0f, shift ? to_float(shift[i]) : 0.0f), &out[i]);
  }
}

template <typename X, typename Shape>
void packed(const NormForward& p, cudaStream_t stream) {
  constexpr int R = Shape::R;
  const Launch at{"norm_forward", static_cast<unsigned>((p.n + R - 1) / R), 32u * Shape::W * R, stream, 0, 1, true};
  if (p.kind == kRmsNorm) {
    launch(at, p.y ? packed_kernel<X, Shape, 1, true> : packed_kernel<X, Shape, 0, true>, p);
  } else if (p.gate.data) {
    launch(at, packed_kernel<X, Shape, 2, false>, p);
  } else {
    launch(at, p.y ? packed_kernel<X, Shape, 1, false> : packed_kernel<X, Shape, 0, false>, p);
  }
}

template <typename X, typename M>
void forward(const NormForward& p, cudaStream_t stream) {
  if constexpr (std::is_same_v<X, M>) {
    bool whole = p.d % kPack<X> == 0 && packed_rows<X>(p.x, p.x_stride) && packed_rows<X>(p.y, p.y_stride);
    for (const NormTable& table : {p.gate, p.shift, p.scale}) whole &= packed_rows<X>(table.data, table.stride);
    if (whole && p.d <= kMaxPacked<OneWarp, X>) return packed<X, OneWarp>(p, stream);
    if (whole && p.d <= kMaxPacked<FourWarps, X>) return packed<X, FourWarps>(p, stream);
  }
  launch({"norm_forward", static_cast<unsigned>(p.n), kAnyThreads, stream, 0, 1, true}, any_kernel<X, M>, p);
}

}  // namespace

void norm_forward_launch(const NormForward& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  const bool wide = p.table_dtype == Dtype::f32;
  if (p.dtype == Dtype::f32) forward<float, float>(p, stream);
  if (p.dtype == Dtype::bf16) (wide ? forward<bf16, float> : forward<bf16, bf16>)(p, stream);
  if (p.dtype == Dtype::f16) (wide ? forward<f16, float> : forward<f16, f16>)(p, stream);
}

}  // namespace flexkernels::cuda
