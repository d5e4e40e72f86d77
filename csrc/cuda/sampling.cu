// Sampling: one block a row. Top-k and top-p are radix selections over the logits' ordered bits, by count and by mass;
// both amounts are integers, so atomic additions in any order leave the same histogram.
#include "../core/sampling.h"

#include "kernels.h"
#include "launch.h"
#include "pack.h"

namespace flexkernels::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
constexpr unsigned kAll = 0xffffffffu;
typedef unsigned long long Amount;

struct Shared {
  Amount bins[kBins];
  Amount of_warp[kWarps];
  Amount needed;
  uint32_t bin;
};

__device__ __forceinline__ Amount larger(Amount a, Amount b) { return a > b ? a : b; }
__device__ __forceinline__ Amount smaller(Amount a, Amount b) { return a < b ? a : b; }
__device__ __forceinline__ Amount plus(Amount a, Amount b) { return a + b; }

// the block's result in every thread
template <typename Combine>
__device__ Amount reduce(Amount value, Shared& s, Combine combine) {
  for (int lane = 16; lane > 0; lane /= 2) value = combine(value, __shfl_xor_sync(kAll, value, lane));
  // the last call's results have been read
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  Amount result = s.of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) result = combine(result, s.of_warp[warp]);
  return result;
}

// the sum over the threads up to this one
__device__ Amount running_sum(Amount value, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const Amount before = __shfl_up_sync(kAll, value, step);
    if (lane >= step) value += before;
  }
  __syncthreads();
  if (lane == 31) s.of_warp[warp] = value;
  __syncthreads();
  for (int before = 0; before < warp; ++before) value += s.of_warp[before];
  return value;
}

template <typename T>
struct Row {
  const T *cond, *uncond;
  int vocab;
  float guidance;

  __device__ __forceinline__ float at(int i) const {
    const float x = to_float(cond[i]);
    return sample_clean(uncond ? sample_guided(x, to_float(uncond[i]), guidance) : x);
  }

  // body(x) for this thread's share of the row
  template <typename Body>
  __device__ __forceinline__ void each(Body body) const {
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += kThreads) body(at(i));
  }
};

__device__ __forceinline__ uint32_t key_of(float x) { return static_cast<uint32_t>(order_of_float(x)) ^ 0x80000000u; }
__device__ __forceinline__ float float_of_key(uint32_t key) {
  return float_of_order(static_cast<int32_t>(key ^ 0x80000000u));
}

// the bin in which the amounts from the highest bin down reach `needed` (at most all), and what is needed of it
__device__ void find_bin(Shared& s, Amount needed) {
  const int top = kBins - 1 - 2 * threadIdx.x;
  const Amount first = s.bins[top], second = s.bins[top - 1];
  const Amount sum = running_sum(first + second, s);
  if (threadIdx.x == kThreads - 1) s.needed = smaller(needed, sum);
  __syncthreads();
  const Amount wanted = s.needed, before = sum - first - second;
  __syncthreads();
  if (before < wanted && wanted <= sum) {
    const bool in_first = wanted <= before + first;
    s.bin = in_first ? top : top - 1;
    s.needed = wanted - before - (in_first ? 0 : first);
  }
  __syncthreads();
}

// the largest value from which on the amounts reach `needed`, or the smallest one; amount_of(x) is 0 for values left
// out
template <typename T, typename AmountOf>
__device__ float threshold(const Row<T>& row, Amount needed, Shared& s, AmountOf amount_of) {
  static_assert(kBins == 2 * kThreads, "a thread has two bins");
  uint32_t prefix = 0;
  int known = 0;
  for (int width : {kBinBits, kBinBits, 32 - 2 * kBinBits}) {
    const int shift = 32 - known - width;
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) s.bins[bin] = 0;
    __syncthreads();
    row.each([&](float x) {
      const uint32_t key = key_of(x);
      if (known && (key ^ prefix) >> (32 - known)) return;
      const Amount amount = amount_of(x);
      if (amount) atomicAdd(&s.bins[(key >> shift) & ((1u << width) - 1)], amount);
    });
    __syncthreads();
    find_bin(s, needed);
    needed = s.needed;
    prefix |= s.bin << shift;
    known += width;
  }
  return float_of_key(prefix);
}

template <typename T>
__device__ float kept_from(const SampleLogits& p, const Row<T>& row, float largest, Shared& s) {
  // the lowest finite number
  float low = -3.402823466e+38f;
  if (p.top_k < p.vocab) {
    low = threshold(row, static_cast<Amount>(p.top_k), s, [](float x) { return Amount{x > -kSampleInfinity}; });
  }
  if (!p.top_p) return low;
  const auto mass = [&](float x) -> Amount {
    return x >= low ? sample_mass(sample_weight<float, int32_t>(sample_exponent(x, largest, p.scale))) : 0;
  };
  Amount total = 0;
  row.each([&](float x) { total += mass(x); });
  total = reduce(total, s, plus);
  return threshold(row, static_cast<Amount>(sample_needed(static_cast<int64_t>(total), p.top_p)), s, mass);
}

// the race: a thread takes Philox blocks, each of which serves four tokens
template <typename T>
__device__ void draw(const SampleLogits& p, int64_t row_index, const Row<T>& row, float largest, float low, Shared& s) {
  const SampleStream stream = sample_stream(p, row_index);
  Amount best = ~Amount{0}, total = 0;
  const int blocks = (row.vocab + kSampleTile - 1) / kSampleTile * 16;
#pragma unroll 1
  for (int block = threadIdx.x; block < blocks; block += kThreads) {
    uint32_t word[4] = {static_cast<uint32_t>(block), stream.row, stream.low, stream.high};
    philox(stream.key, word);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = block / 16 * kSampleTile + 16 * j + block % 16;
      if (i >= row.vocab) continue;
      const float x = row.at(i);
      if (!(x >= low)) continue;
      const float y = sample_exponent(x, largest, p.scale), weight = sample_weight<float, int32_t>(y);
      if (!(y >= p.log2_minp) || weight == 0) continue;
      total += sample_mass(weight);
      const float time = rounded_div(sample_exponential<float, int32_t>(static_cast<int32_t>(word[j] >> 1)), weight);
      // positive floats are ordered like their bits; the lower index wins a tie
      best = smaller(best, Amount{bits_of_float(time)} << 32 | static_cast<uint32_t>(i));
    }
  }
  best = reduce(best, s, smaller);
  if (p.logprob) total = reduce(total, s, plus);
  if (threadIdx.x) return;
  const int id = static_cast<int>(best & 0xffffffffu);
  p.ids[row_index] = id;
  if (!p.logprob) return;
  p.logprob[row_index] = sample_logprob(sample_exponent(row.at(id), largest, p.scale), static_cast<int64_t>(total));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_logits_kernel(const __grid_constant__ SampleLogits p) {
  __shared__ Shared s;
  const int64_t index = blockIdx.x;
  const T* uncond = static_cast<const T*>(p.uncond);
  const Row<T> row{static_cast<const T*>(p.logits) + index * p.logits_stride,
                   uncond ? uncond + index * p.uncond_stride : nullptr, static_cast<int>(p.vocab), p.guidance};
  // the largest value, and its lowest index
  Amount first = 0;
  for (int i = threadIdx.x; i < row.vocab; i += kThreads) {
    first = larger(first, Amount{key_of(row.at(i))} << 32 | (0xffffffffu - i));
  }
  first = reduce(first, s, larger);
  const float largest = float_of_key(static_cast<uint32_t>(first >> 32));
  const bool blank = largest == -kSampleInfinity;
  if (blank || p.scale == 0) {
    if (threadIdx.x) return;
    p.ids[index] = 0xffffffffu - static_cast<uint32_t>(first);
    if (p.logprob) p.logprob[index] = blank ? __int_as_float(0x7fc00000) : 0.0f;
    return;
  }
  const float low = kept_from(p, row, largest, s);
  draw(p, index, row, largest, low, s);
}

template <typename T>
void sample(const SampleLogits& p, cudaStream_t stream) {
  launch({"sample_logits", static_cast<unsigned>(p.n), kThreads, stream}, sample_logits_kernel<T>, p);
}

}  // namespace

void sample_logits_launch(const SampleLogits& p, void* stream) {
  if (p.dtype == Dtype::f32) sample<float>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::bf16) sample<bf16>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::f16) sample<f16>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace flexkernels::cuda
