// The rows by segment, and where each segment begins: one block finds them where the host may not look at values,
// inside a graph. Most segments rise along the rows; one pass sees that they do, and the order is the rows as they are.
// Otherwise rows are sorted by one bit of their segment a pass; a thread takes neighbouring rows, so equal ones keep
// their order.
#include "norm.h"

namespace flexkernels::cuda {
namespace {

constexpr int kOrderThreads = 1024;

// sum of `value` over the threads below this one; `total` over all of them. `of_warps` is free after the next barrier
__device__ __forceinline__ int sum_below(int value, int (&of_warps)[kOrderThreads / 32], int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, by);
    if (lane >= by) sum += below;
  }
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kOrderThreads / 32; ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  return before + sum - value;
}

// segments below 2^bits
__global__ void __launch_bounds__(kOrderThreads, 1) order_kernel(const __grid_constant__ SegmentOrder p, int bits) {
  __shared__ int of_warps[kOrderThreads / 32];
  const int n = static_cast<int>(p.n), t = threadIdx.x;
  const auto segment_of = [&](int64_t row) { return static_cast<int>(norm_segment(p.segment, row, p.segments)); };
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  bool rises = true;
#pragma unroll 4
  for (int i = t; i < n; i += kOrderThreads) {
    p.order[i] = i;
    rises &= i == 0 || segment_of(i - 1) <= segment_of(i);
  }
  if (!__syncthreads_and(rises)) {
    const int each = (n + kOrderThreads - 1) / kOrderThreads;
    const int first = t * each < n ? t * each : n, end = first + each < n ? first + each : n;
    // the last pass ends in `order`
    int64_t *to = bits % 2 ? p.order : p.spare, *from = bits % 2 ? p.spare : p.order;
    for (int bit = 0; bit < bits; ++bit) {
      const auto row_at = [&](int i) { return bit == 0 ? i : from[i]; };
      const auto set = [&](int64_t row) { return segment_of(row) >> bit & 1; };
      int zeros = 0, all_zeros;
      for (int i = first; i < end; ++i) zeros += !set(row_at(i));
      int low = sum_below(zeros, of_warps, all_zeros);
      int high = all_zeros + first - low;
      for (int i = first; i < end; ++i) {
        const int64_t row = row_at(i);
        to[set(row) ? high++ : low++] = row;
      }
      __syncthreads();
      int64_t* const swapped = to;
      to = from;
      from = swapped;
    }
  }
  for (int i = t; i < n; i += kOrderThreads) {
    const int s = segment_of(p.order[i]);
    for (int k = i == 0 ? 0 : segment_of(p.order[i - 1]) + 1; k <= s; ++k) p.offsets[k] = i;
    if (i + 1 < n) continue;
    for (int64_t k = s + 1; k <= p.segments; ++k) p.offsets[k] = n;
  }
}

}  // namespace

void segment_order_launch(const SegmentOrder& p, void* stream) {
  int bits = 1;
  while (p.segments > int64_t{1} << bits) ++bits;
  const Launch at{"norm_backward", 1, kOrderThreads, static_cast<cudaStream_t>(stream), 0, 1, true};
  launch(at, order_kernel, p, bits);
}

}  // namespace flexkernels::cuda
