// Row norms, backward, by one of two ways, chosen by width, dtypes and what is there.
// Fused, where a row is whole packs of 16 bytes and there is a norm: a block walks a run of rows in the order of their
// segments, a pack a thread; the two rows after this one are under way to shared memory, each pack to the thread that
// copies it, and the sums over the rows stay in registers until the segment changes; then they go to their slot, and
// merge_kernel adds the slots of a segment in their order. A row costs one barrier: the mean of the next one is summed
// along with the moments of this one, so v comes a row before the rest. Statistics kept by the forward would spare
// neither the barrier nor a byte.
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

// totals over the block in every thread, one barrier. N a power of two: lanes that are `by` apart each take half of the
// values over from the other, so that a lane ends with one value's total and N values cost hardly more than one.
// `buffer` must not be that of the call before, and is zero behind the block's warps
template <int N, int W>
__device__ __forceinline__ void totals_of(float (&v)[N], float (*buffer)[N]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = N / 2, by = 16; by > 0; half /= 2, by /= 2) {
    if (half == 0) v[0] += __shfl_xor_sync(0xffffffffu, v[0], by);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = lane & by ? v[i + half] : v[i], given = lane & by ? v[i] : v[i + half];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, given, by);
    }
  }
  if (lane % (32 / N) == 0) buffer[threadIdx.x / 32][lane * N / 32] = v[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = 0;
#pragma unroll
  for (int w = 0; w < W; ++w) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += buffer[w][i];
  }
}

// a = grad_out * factor, rounded here: joined with the subtraction of a's mean it would not cancel in a row of one
// element
template <bool RMS>
__device__ __forceinline__ float times_factor(float grad_out, float factor) {
  return __fmul_rn(grad_out, RMS ? factor : 1.0f + factor);
}

// rows of a tensor in shared memory: one in use, two under way
constexpr int kStages = 3;

// SUM: grad_sum is there; GATE: gate and y too. T threads at most.
// Dynamic shared memory: packs [v, grad_out, then grad_sum, then y][kStages][T]
template <typename X, int T, bool RMS, bool SUM, bool GATE>
__global__ void __launch_bounds__(T, 512 / T) fused_kernel(const __grid_constant__ NormGradients p, unsigned run) {
  constexpr int N = kPack<X>, W = T / 32;
  const NormBackward& r = p.rows;
  // moments: of this row two or three, and the sum of the next; two of each, since a row's are written while a slow
  // warp reads those of the row before
  constexpr int M = RMS ? 2 : 4;
  __shared__ float totals[W][1];
  alignas(16) __shared__ float moments[2][W][M];
  const int t = threadIdx.x, warps = blockDim.x / 32, column = t * N;
  uint4* const packs = ptx::dynamic_shared<uint4>() + t;
  const bool active = column < r.d;
  const int row_bytes = static_cast<int>(r.d * sizeof(X));
  const unsigned n = static_cast<unsigned>(r.n), first = blockIdx.x * run, end = first + run < n ? first + run : n;
  const float per = 1.0f / static_cast<float>(r.d);
  float sum_gate[N] = {}, sum_shift[N] = {}, sum_scale[N] = {};
  uint4 gate = make_uint4(0, 0, 0, 0), scale = gate;
  for (int w = warps + t; w < W; w += blockDim.x) {
    totals[w][0] = 0;
#pragma unroll
    for (int k = 0; k < M; ++k) moments[0][w][k] = moments[1][w][k] = 0;
  }
  if (!active) {
    // threads beyond the row read zeros
#pragma unroll
    for (int k = 0; k < (GATE ? 4 : SUM ? 3 : 2) * kStages; ++k) packs[k * T] = gate;
  }
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  const auto row_at = [&](unsigned i) { return i < end ? static_cast<int>(norm_row(p.sums, i)) : 0; };
  const auto segment_at = [&](int row) { return static_cast<int>(norm_segment(r.segment, row, r.segments)); };
  // bytes from the start of a tensor to this thread's pack of a row
  const auto offset = [&](int row) { return static_cast<int64_t>(row) * row_bytes + 16 * t; };
  const auto copy = [&](int which, int stage, const void* from, int64_t at) {
    ptx::cp_async<16>(packs + (which * kStages + stage) * T, static_cast<const char*>(from) + at);
  };
  // what the i-th row needs, to `stage`, and v of the row after it, to the next
  const auto fetch = [&](unsigned i, int stage, int row, int next_stage, int next_row) {
    if (active && i < end) {
      const int64_t at = offset(row);
      if (i + 1 < end) copy(0, next_stage, r.v, offset(next_row));
      copy(1, stage, r.grad_out, at);
      if constexpr (SUM) copy(2, stage, r.grad_sum, at);
      if constexpr (GATE) copy(3, stage, p.sums.y, at);
    }
    ptx::cp_async_commit();
  };
  const auto flush = [&](int segment) {
    if (!active || !p.sums.partial) return;
    const auto put = [&](int which, const void* wanted, float (&sums)[N]) {
      if (wanted) store_sums<X>(norm_slot(p.sums, which, blockIdx.x, segment, gridDim.x) + column, sums);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] = 0;
    };
    if constexpr (GATE) put(0, p.sums.grad_gate, sum_gate);
    put(1, p.sums.grad_shift, sum_shift);
    put(2, p.sums.grad_scale, sum_scale);
  };

  // the rows of this and the next three places: a copy waits for no load of its row
  int row = row_at(first), row1 = row_at(first + 1), row2 = row_at(first + 2), row3 = row_at(first + 3), current = -1;
  if (active) copy(0, 0, r.v, offset(row));
  ptx::cp_async_commit();
  fetch(first, 0, row, 1, row1);
  fetch(first + 1, 1, row1, 2, row2);
  int stage = 0, stage1 = 1, stage2 = 2, next_segment = segment_at(row);
  ptx::cp_async_wait<2>();
  uint4 next_v = packs[0];
  float mean = 0;
  if constexpr (!RMS) {
    float total[1] = {sum_of<X>(next_v)};
    totals_of<1, W>(total, totals);
    mean = total[0] * per;
  }
  for (unsigned i = first; i < end; ++i) {
    const int64_t at = offset(row);
    const int s = next_segment;
    row = row1;
    next_segment = segment_at(row);
    ptx::cp_async_wait<1>();
    // over the row before this one
    fetch(i + 2, stage2, row2, stage, row3);
    row1 = row2;
    row2 = row3;
    row3 = row_at(i + 4);
    float v[N], out[N], factor[N];
    unpack<X>(next_v, v);
    if (i + 1 < end) next_v = packs[stage1 * T];
    const uint4* const here = packs + stage * T;
    if (s != current) {
      if (current >= 0) flush(current);
      if (active) {
        if constexpr (GATE) gate = ptx::load_constant(table_or_zeros<X>(r.gate, s) + column);
        scale = ptx::load_constant(table_or_zeros<X>(r.scale, s) + column);
      }
      current = s;
    }
    unpack<X>(here[kStages * T], out);
    unpack<X>(scale, factor);
    // of a = grad_out * factor: sum a (v - mean); sum (v - mean)^2; sum a
    const float centre = active ? mean : 0.0f;
    float sums[M] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) {
      v[j] -= centre;
      const float a = times_factor<RMS>(out[j], factor[j]);
      sums[0] = fmaf(a, v[j], sums[0]);
      sums[1] = fmaf(v[j], v[j], sums[1]);
      if constexpr (!RMS) sums[2] += a;
    }
    if constexpr (!RMS) sums[3] = sum_of<X>(next_v);
    totals_of<M, W>(sums, moments[i & 1]);
    const float rstd = 1.0f / sqrtf(sums[1] * per + r.eps), mean_ax = sums[0] * rstd * per;
    float mean_a = 0;
    if constexpr (!RMS) {
      mean_a = sums[2] * per;
      mean = sums[3] * per;
    }
    float dv[N], by[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      v[j] *= rstd;
      dv[j] = rstd * (times_factor<RMS>(out[j], factor[j]) - mean_a - v[j] * mean_ax);
      sum_shift[j] += out[j];
      sum_scale[j] = fmaf(out[j], v[j], sum_scale[j]);
    }
    if constexpr (SUM) {
      unpack<X>(here[2 * kStages * T], by);
#pragma unroll
      for (int j = 0; j < N; ++j) dv[j] += by[j];
    }
    if (active) *reinterpret_cast<uint4*>(static_cast<char*>(r.grad_x) + at) = pack<X>(dv);
    if constexpr (GATE) {
      unpack<X>(here[3 * kStages * T], by);
#pragma unroll
      for (int j = 0; j < N; ++j) sum_gate[j] = fmaf(dv[j], by[j], sum_gate[j]);
      unpack<X>(gate, by);
#pragma unroll
      for (int j = 0; j < N; ++j) dv[j] *= by[j];
      if (active && r.grad_y) *reinterpret_cast<uint4*>(static_cast<char*>(r.grad_y) + at) = pack<X>(dv);
    }
    const int freed = stage;
    stage = stage1;
    stage1 = stage2;
    stage2 = freed;
  }
  if (current >= 0) flush(current);
  ptx::cp_async_wait<0>();
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

template <int V>
__device__ __forceinline__ void store_sum(const NormSums& p, void* grad, int64_t at, const float (&sum)[V]) {
  if (p.sum_dtype == Dtype::f32) store_floats<V>(static_cast<float*>(grad) + at, sum);
  if (p.sum_dtype == Dtype::bf16) store_floats<V>(static_cast<bf16*>(grad) + at, sum);
  if (p.sum_dtype == Dtype::f16) store_floats<V>(static_cast<f16*>(grad) + at, sum);
}

// block (32, P): 32 V columns of one table of one segment; part y adds slots y, y + P, ..., then the parts in order
template <int V, int P>
__global__ void __launch_bounds__(32 * P) merge_kernel(const __grid_constant__ NormSums p, unsigned run, int64_t runs) {
  __shared__ Pack<float, V> parts[P][32];
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x) * V, s = blockIdx.x;
  const int which = blockIdx.z;
  void* grad = which == 0 ? p.grad_gate : which == 1 ? p.grad_shift : p.grad_scale;
  if (!grad) return;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const auto begin = static_cast<unsigned>(norm_begin(p, s)), end = static_cast<unsigned>(norm_begin(p, s + 1));
  float sum[V] = {};
  if (column < p.d && begin < end) {
    const int last = (end - 1) / run;
#pragma unroll 4
    for (int i = begin / run + threadIdx.y; i <= last; i += P) {
      float slot[V];
      load_floats<V>(norm_slot(p, which, i, s, runs) + column, slot);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += slot[j];
    }
  }
  store_floats<V>(parts[threadIdx.y][threadIdx.x].v, sum);
  __syncthreads();
  if (threadIdx.y > 0 || column >= p.d) return;
#pragma unroll
  for (int k = 1; k < P; ++k) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += parts[k][threadIdx.x].v[j];
  }
  store_sum<V>(p, grad, s * p.d + column, sum);
}

// one segment has all slots to itself: more parts
template <int V>
void merge(const NormSums& p, int64_t run, int64_t runs, cudaStream_t stream) {
  constexpr int kFew = 8, kMany = 32;
  const bool one = p.segments == 1;
  const dim3 grid(static_cast<unsigned>(p.segments), static_cast<unsigned>((p.d + 32 * V - 1) / (32 * V)), 3);
  launch({"norm_backward", grid, dim3(32, one ? kMany : kFew), stream, 0, 1, true},
         one ? merge_kernel<V, kMany> : merge_kernel<V, kFew>, p, static_cast<unsigned>(run), runs);
}

constexpr int kFewThreads = 256, kManyThreads = 512;

template <typename X, int T>
void fused(const NormGradients& p, unsigned run, int64_t runs, cudaStream_t stream) {
  const int64_t packs = p.rows.d / kPack<X>;
  const unsigned threads = static_cast<unsigned>((packs + 31) / 32 * 32);
  const bool gated = p.rows.grad_sum && p.sums.y && p.rows.gate.data && p.rows.kind == kLayerNorm;
  const unsigned rows = kStages * (gated ? 4 : p.rows.grad_sum ? 3 : 2), bytes = rows * T * 16;
  const Launch at{"norm_backward", static_cast<unsigned>(runs), threads, stream, bytes, 1, true};
  if (p.rows.kind == kRmsNorm) {
    launch(at, p.rows.grad_sum ? fused_kernel<X, T, true, true, false> : fused_kernel<X, T, true, false, false>, p,
           run);
  } else if (gated) {
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
    (d <= kFewThreads * kPack<X> ? fused<X, kFewThreads> : fused<X, kManyThreads>)(p, static_cast<unsigned>(run), runs,
                                                                                   stream);
  } else {
    if (p.rows.grad_x || p.rows.grad_y) {
      launch({"norm_backward", static_cast<unsigned>(n), kAnyThreads, stream}, rows_kernel<X, M>, p.rows);
    }
    const dim3 grid(static_cast<unsigned>(runs), static_cast<unsigned>((d + kAnyThreads - 1) / kAnyThreads));
    if (s.partial) launch({"norm_backward", grid, kAnyThreads, stream}, sums_kernel<X>, s, run);
  }
  if (s.partial) (d % 4 ? merge<1> : merge<4>)(s, run, runs, stream);
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
