// Row norms, backward, by one of two ways, chosen by width, dtypes and what is there.
// Fused, where a row is whole packs of 16 bytes and there is a norm: a block walks a run of rows in the order of their
// segments, a pack a thread; the next row is under way while this one is computed, and the sums over the rows stay in
// registers until the segment changes; then they go to their slot, and merge_kernel adds the slots of a segment in
// their order. A row costs one barrier: the mean of the next one is summed along with the moments of this one, so v
// comes two rows ahead. Statistics kept by the forward would spare neither the barrier nor a byte.
// Otherwise rows_kernel computes the rows and sums_kernel the same slots.
#include "norm.h"

namespace flexkernels::cuda {
namespace {

template <typename X>
__device__ __forceinline__ void store_sums(float* to, const float (&v)[kPack<X>]) {
#pragma unroll
  for (int j = 0; j < kPack<X>; j += 4) {
    *reinterpret_cast<float4*>(to + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
  }
}

template <typename X>
__device__ __forceinline__ float sum_of(const uint4& raw) {
  float v[kPack<X>], sum = 0;
  unpack<X>(raw, v);
#pragma unroll
  for (int j = 0; j < kPack<X>; ++j) sum += v[j];
  return sum;
}

// a = grad_out * factor, rounded here: joined with the subtraction of a's mean it would not cancel in a row of one
// element
template <bool RMS>
__device__ __forceinline__ float times_factor(float grad_out, float factor) {
  return __fmul_rn(grad_out, RMS ? factor : 1.0f + factor);
}

// SUM: grad_sum is there; GATE: gate and y too. T threads at most
template <typename X, int T, bool RMS, bool SUM, bool GATE>
__global__ void __launch_bounds__(T, 512 / T) fused_kernel(const __grid_constant__ NormGradients p, int64_t run) {
  constexpr int N = kPack<X>;
  const NormBackward& r = p.rows;
  // moments: of this row three, and the sum of the next; two of each, since a row's are written while a slow warp reads
  // those of the row before
  constexpr int M = RMS ? 3 : 4;
  __shared__ float totals[T / 32][1], moments[2][T / 32][M];
  const int t = threadIdx.x, warps = blockDim.x / 32, column = t * N;
  const bool active = column < r.d;
  const int64_t first = blockIdx.x * run, end = first + run < r.n ? first + run : r.n;
  const float per = 1.0f / static_cast<float>(r.d);
  float sum_gate[N] = {}, sum_shift[N] = {}, sum_scale[N] = {};
  const uint4 zero = make_uint4(0, 0, 0, 0);
  uint4 next_out = zero, next_sum = zero, next_v = zero, after_v = zero, next_y = zero, gate = zero, scale = zero;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  const auto load = [&](const void* from, int64_t row) {
    return ptx::load_constant_once(static_cast<const X*>(from) + row * r.d + column);
  };
  const auto fetch = [&](int64_t row) {
    if (!active) return;
    next_out = load(r.grad_out, row);
    if constexpr (SUM) next_sum = load(r.grad_sum, row);
    if constexpr (GATE) next_y = load(p.sums.y, row);
  };
  const auto flush = [&](int64_t segment) {
    if (!active || !p.sums.offsets) return;
    const auto put = [&](int which, const float* wanted, float (&sums)[N]) {
      if (wanted) store_sums<X>(norm_slot(p.sums, which, blockIdx.x, segment, gridDim.x) + column, sums);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] = 0;
    };
    if constexpr (GATE) put(0, p.sums.grad_gate, sum_gate);
    put(1, p.sums.grad_shift, sum_shift);
    put(2, p.sums.grad_scale, sum_scale);
  };

  const auto fetch_v = [&](int64_t i) {
    if (active && i < end) after_v = load(r.v, norm_row(p.sums, i));
  };

  int64_t row = norm_row(p.sums, first), current = -1;
  fetch(row);
  fetch_v(first);
  next_v = after_v;
  fetch_v(first + 1);
  float mean = 0;
  if constexpr (!RMS) {
    float total[1] = {sum_of<X>(next_v)};
    block_sums<1>(total, totals, warps);
    mean = total[0] * per;
  }
  for (int64_t i = first; i < end; ++i) {
    const uint4 raw_out = next_out, raw_sum = next_sum, raw_y = next_y;
    float v[N], out[N], factor[N];
    unpack<X>(next_v, v);
    const int64_t at = row * r.d + column, s = norm_segment(r.segment, row, r.segments);
    next_v = after_v;
    if (i + 1 < end) fetch(row = norm_row(p.sums, i + 1));
    fetch_v(i + 2);
    if (s != current) {
      if (current >= 0) flush(current);
      if (active) {
        if constexpr (GATE) gate = ptx::load_constant(table_or_zeros<X>(r.gate, s) + column);
        scale = ptx::load_constant(table_or_zeros<X>(r.scale, s) + column);
      }
      current = s;
    }
    unpack<X>(raw_out, out);
    unpack<X>(scale, factor);
    // of a = grad_out * factor: sum a, sum a (v - mean); sum (v - mean)^2
    float sums[M] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) {
      v[j] = active ? v[j] - mean : 0.0f;
      const float a = times_factor<RMS>(out[j], factor[j]);
      sums[0] += a;
      sums[1] = fmaf(a, v[j], sums[1]);
      sums[2] = fmaf(v[j], v[j], sums[2]);
    }
    if constexpr (!RMS) sums[3] = sum_of<X>(next_v);
    block_sums<M>(sums, moments[i & 1], warps);
    if constexpr (!RMS) mean = sums[3] * per;
    const float rstd = 1.0f / sqrtf(sums[2] * per + r.eps);
    const float mean_a = RMS ? 0.0f : sums[0] * per, mean_ax = sums[1] * rstd * per;
    float dv[N], by[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      v[j] *= rstd;
      dv[j] = rstd * (times_factor<RMS>(out[j], factor[j]) - mean_a - v[j] * mean_ax);
      sum_shift[j] += out[j];
      sum_scale[j] = fmaf(out[j], v[j], sum_scale[j]);
    }
    if constexpr (SUM) {
      unpack<X>(raw_sum, by);
#pragma unroll
      for (int j = 0; j < N; ++j) dv[j] += by[j];
    }
    if (active) *reinterpret_cast<uint4*>(static_cast<X*>(r.grad_x) + at) = pack<X>(dv);
    if constexpr (GATE) {
      unpack<X>(raw_y, by);
#pragma unroll
      for (int j = 0; j < N; ++j) sum_gate[j] = fmaf(dv[j], by[j], sum_gate[j]);
      unpack<X>(gate, by);
#pragma unroll
      for (int j = 0; j < N; ++j) dv[j] *= by[j];
      if (active && r.grad_y) *reinterpret_cast<uint4*>(static_cast<X*>(r.grad_y) + at) = pack<X>(dv);
    }
  }
  if (current >= 0) flush(current);
}

constexpr int kAnyThreads = 256;

// a block a row, read again for each pass; M is the tables' dtype
template <typename X, typename M>
__global__ void __launch_bounds__(kAnyThreads, 4) rows_kernel(const __grid_constant__ NormBackward p) {
  __shared__ float totals[kAnyThreads / 32][1], squares[kAnyThreads / 32][1], moments[kAnyThreads / 32][2];
  const int64_t row = blockIdx.x, s = norm_segment(p.segment, row, p.segments), base = row * p.d;
  const X *grad_out = static_cast<const X*>(p.grad_out), *grad_sum = static_cast<const X*>(p.grad_sum);
  const X* v = static_cast<const X*>(p.v);
  const M *gate = table_row<M>(p.gate, s), *scale = table_row<M>(p.scale, s);
  const float per = 1.0f / static_cast<float>(p.d), one = p.kind == kLayerNorm ? 1.0f : 0.0f;
  const auto a_of = [&](int64_t i) {
    return __fmul_rn(to_float(grad_out[base + i]), scale ? one + to_float(scale[i]) : 1.0f);
  };
  float mean[1] = {0}, square[1] = {0}, two[2] = {0, 0}, rstd = 0;
  if (grad_out) {
    if (p.kind == kLayerNorm) {
      for (int64_t i = threadIdx.x; i < p.d; i += kAnyThreads) mean[0] += to_float(v[base + i]);
      block_sums<1>(mean, totals, kAnyThreads / 32);
      mean[0] *= per;
    }
    for (int64_t i = threadIdx.x; i < p.d; i += kAnyThreads) {
      const float c = to_float(v[base + i]) - mean[0];
      square[0] = fmaf(c, c, square[0]);
    }
    block_sums<1>(square, squares, kAnyThreads / 32);
    rstd = 1.0f / sqrtf(square[0] * per + p.eps);
    for (int64_t i = threadIdx.x; i < p.d; i += kAnyThreads) {
      const float a = a_of(i);
      two[0] += a;
      two[1] = fmaf(a, (to_float(v[base + i]) - mean[0]) * rstd, two[1]);
    }
    block_sums<2>(two, moments, kAnyThreads / 32);
    two[0] *= p.kind == kLayerNorm ? per : 0.0f;
    two[1] *= per;
  }
  if (p.stats && threadIdx.x == 0) {
    p.stats[2 * row] = mean[0];
    p.stats[2 * row + 1] = rstd;
  }
  for (int64_t i = threadIdx.x; i < p.d; i += kAnyThreads) {
    float dv = 0;
    if (grad_out) dv = rstd * (a_of(i) - two[0] - (to_float(v[base + i]) - mean[0]) * rstd * two[1]);
    if (grad_sum) dv += to_float(grad_sum[base + i]);
    if (p.grad_x) from_float(dv, static_cast<X*>(p.grad_x) + base + i);
    if (p.grad_y) from_float(gate ? dv * to_float(gate[i]) : dv, static_cast<X*>(p.grad_y) + base + i);
  }
}

// a run of rows of one block, a column of one thread
template <typename X>
__global__ void __launch_bounds__(kAnyThreads) sums_kernel(const __grid_constant__ NormSums p, int64_t run) {
  const int64_t first = blockIdx.x * run, end = first + run < p.n ? first + run : p.n, runs = gridDim.x;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kAnyThreads + threadIdx.x;
  if (column >= p.d) return;
  float gate = 0, shift = 0, scale = 0;
  for (int64_t i = first; i < end; ++i) {
    const int64_t row = norm_row(p, i), at = row * p.d + column, s = norm_segment(p.segment, row, p.segments);
    if (p.grad_gate)
      gate = fmaf(to_float(static_cast<const X*>(p.dv)[at]), to_float(static_cast<const X*>(p.y)[at]), gate);
    if (p.grad_shift || p.grad_scale) {
      const float grad = to_float(static_cast<const X*>(p.grad_out)[at]);
      shift += grad;
      if (p.grad_scale) {
        const float normed = (to_float(static_cast<const X*>(p.v)[at]) - p.stats[2 * row]) * p.stats[2 * row + 1];
        scale = fmaf(grad, normed, scale);
      }
    }
    if (i + 1 < end && norm_segment(p.segment, norm_row(p, i + 1), p.segments) == s) continue;
    norm_slot(p, 0, blockIdx.x, s, runs)[column] = gate;
    norm_slot(p, 1, blockIdx.x, s, runs)[column] = shift;
    norm_slot(p, 2, blockIdx.x, s, runs)[column] = scale;
    gate = shift = scale = 0;
  }
}

// block (32, 8): 32 columns of one table of one segment; part y adds slots y, y + 8, ..., then the parts in order
__global__ void __launch_bounds__(256) merge_kernel(const __grid_constant__ NormSums p, int64_t run, int64_t runs) {
  __shared__ float parts[8][32];
  const int64_t column = static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x, s = blockIdx.x;
  const int which = blockIdx.z;
  float* grad = which == 0 ? p.grad_gate : which == 1 ? p.grad_shift : p.grad_scale;
  if (!grad) return;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t begin = p.offsets[s], end = p.offsets[s + 1];
  float sum = 0;
  if (column < p.d && begin < end) {
    const int64_t last = (end - 1) / run;
    for (int64_t i = begin / run + threadIdx.y; i <= last; i += 8) sum += norm_slot(p, which, i, s, runs)[column];
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= p.d) return;
#pragma unroll
  for (int k = 1; k < 8; ++k) sum += parts[k][threadIdx.x];
  grad[s * p.d + column] = sum;
}

constexpr int kFewThreads = 256, kManyThreads = 512;

template <typename X, int T>
void fused(const NormGradients& p, int64_t run, int64_t runs, cudaStream_t stream) {
  const int64_t packs = p.rows.d / kPack<X>;
  const unsigned threads = static_cast<unsigned>((packs + 31) / 32 * 32);
  const Launch at{"norm_backward", static_cast<unsigned>(runs), threads, stream, 0, 1, true};
  if (p.rows.kind == kRmsNorm) {
    launch(at, p.rows.grad_sum ? fused_kernel<X, T, true, true, false> : fused_kernel<X, T, true, false, false>, p,
           run);
  } else if (p.rows.grad_sum && p.sums.y && p.rows.gate.data) {
    launch(at, fused_kernel<X, T, false, true, true>, p, run);
  } else {
    launch(at, p.rows.grad_sum ? fused_kernel<X, T, false, true, false> : fused_kernel<X, T, false, false, false>, p,
           run);
  }
}

// whether the fused kernel computes everything that is asked for
template <typename X>
bool fusible(const NormGradients& p) {
  const NormBackward& r = p.rows;
  bool whole = r.d % kPack<X> == 0 && r.d <= kManyThreads * kPack<X>;
  for (const NormTable& table : {r.gate, r.scale}) whole &= packed_rows<X>(table.data, table.stride);
  const bool gated = r.grad_sum && p.sums.y && r.gate.data;
  return whole && r.grad_out && (gated || (!r.grad_y && !p.sums.grad_gate));
}

template <typename X, typename M>
void backward(const NormGradients& p, cudaStream_t stream) {
  const int64_t n = p.rows.n, d = p.rows.d, run = norm_run(n), runs = (n + run - 1) / run;
  const NormSums& s = p.sums;
  if (std::is_same_v<X, M> && fusible<X>(p)) {
    d <= kFewThreads* kPack<X> ? fused<X, kFewThreads>(p, run, runs, stream)
                               : fused<X, kManyThreads>(p, run, runs, stream);
  } else {
    if (p.rows.grad_x || p.rows.grad_y) {
      launch({"norm_backward", static_cast<unsigned>(n), kAnyThreads, stream}, rows_kernel<X, M>, p.rows);
    }
    const dim3 grid(static_cast<unsigned>(runs), static_cast<unsigned>((d + kAnyThreads - 1) / kAnyThreads));
    if (s.offsets) launch({"norm_backward", grid, kAnyThreads, stream}, sums_kernel<X>, s, run);
  }
  if (!s.offsets) return;
  const dim3 grid(static_cast<unsigned>(s.segments), static_cast<unsigned>((d + 31) / 32), 3);
  launch({"norm_backward", grid, dim3(32, 8), stream, 0, 1, true}, merge_kernel, s, run, runs);
}

}  // namespace

void norm_backward_launch(const NormGradients& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  const bool wide = p.rows.table_dtype == Dtype::f32;
  if (p.rows.dtype == Dtype::f32) backward<float, float>(p, stream);
  if (p.rows.dtype == Dtype::bf16) (wide ? backward<bf16, float> : backward<bf16, bf16>)(p, stream);
  if (p.rows.dtype == Dtype::f16) (wide ? backward<f16, float> : backward<f16, f16>)(p, stream);
}

}  // namespace flexkernels::cuda
