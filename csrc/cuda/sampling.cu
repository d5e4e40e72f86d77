// Sampling. A cluster of up to 8 blocks has a row, each block a slice of it: the slice is read once, guided, and kept
// as float32 in shared memory. Vocabularies up to 4,096, and GPUs before sm_90, which have no clusters, take one block
// a row that reads it again for every pass.
//
// The largest value, the thresholds of top-k (by count) and of top-p (by mass) and the winner of the race are found by
// all blocks together. A threshold is a radix selection over the ordered bits of floats, 11 bits a round: each block
// counts its slice into bins of its own, the cluster meets once, then every block adds the bins of all and finds the
// same bin. Buffers alternate: what a block overwrites was read by the others before they came to the meeting before.
// Counts and masses are integers, so no order of additions shows in a result.
//
// Paper count for [2, 64000] with guidance, top-k and top-p: 0.5 MB, 0.2 us of an H100's memory; start 1.3 us, one trip
// to memory 1.2, the largest 1.2, six rounds of 8 elements a thread, a meeting (0.6) and the bins of 8 blocks (0.7) 2
// us each, the race 1.5: about 17 us. [2, 64000] in bfloat16 without guidance: four rounds, 13 us.
#include "../core/sampling.h"

#include "kernels.h"
#include "launch.h"
#include "pack.h"
#include "ptx.h"

namespace flexkernels::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
// tokens for a block, where a cluster can have more blocks, and blocks of a cluster
constexpr int64_t kSlice = 4096;
constexpr unsigned kMostBlocks = 8;
constexpr unsigned kAll = 0xffffffffu;
typedef uint64_t Amount;

#if __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
// the kernels with clusters are not launched there, but compiled
constexpr bool kHasClusters = false;
#endif

// dynamic shared memory; the values of the slice follow
struct Shared {
  // amounts of this block's slice in words of 32 bits, which shared memory adds by itself; a pair is read as 64 bits
  __align__(16) uint32_t low[2][kBins];
  __align__(16) uint32_t high[2][kBins];
  Amount of_warp[kWarps];
  Amount of_block[2];
  Amount needed;
  uint32_t bin;
  bool whole;
};

__device__ __forceinline__ Amount larger(Amount a, Amount b) { return a > b ? a : b; }
__device__ __forceinline__ Amount smaller(Amount a, Amount b) { return a < b ? a : b; }
__device__ __forceinline__ Amount plus(Amount a, Amount b) { return a + b; }

// the blocks that share a row, and which of the two buffers is next
template <bool kCluster>
struct Blocks {
  int rank = 0, size = 1, turn = 0;

  __device__ __forceinline__ Blocks() {
    if constexpr (kCluster && kHasClusters) {
      rank = ptx::cluster_rank();
      size = ptx::cluster_size();
    }
  }

  // all threads of all blocks; what they wrote before is visible
  __device__ __forceinline__ void meet() const {
    if constexpr (kCluster && kHasClusters) {
      ptx::cluster_sync();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ Amount read(const Amount* shared, int of) const {
    if constexpr (kCluster && kHasClusters) return ptx::cluster_load(shared, of);
    return *shared;
  }
};

// the row's result in every thread
template <bool kCluster, typename Combine>
__device__ Amount reduce(Amount value, Shared& s, Blocks<kCluster>& blocks, Combine combine) {
  for (int lane = 16; lane > 0; lane /= 2) value = combine(value, __shfl_xor_sync(kAll, value, lane));
  // the last call's results have been read
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = s.of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, s.of_warp[warp]);
  if constexpr (!kCluster) return value;
  Amount& mine = s.of_block[blocks.turn];
  blocks.turn ^= 1;
  if (threadIdx.x == 0) mine = value;
  blocks.meet();
  value = blocks.read(&mine, 0);
  for (int of = 1; of < blocks.size; ++of) value = combine(value, blocks.read(&mine, of));
  return value;
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

// floats, without NaN and -0, as integers in their order
__device__ __forceinline__ uint32_t key_of(float x) { return static_cast<uint32_t>(order_of_float(x)) ^ 0x80000000u; }
__device__ __forceinline__ float float_of_key(uint32_t key) {
  return float_of_order(static_cast<int32_t>(key ^ 0x80000000u));
}

// the tokens [first, end) of a row; first is a multiple of kSampleTile
template <typename T, bool kKept>
struct Slice {
  const T *cond, *uncond;
  float* kept;  // [end - first]
  int first, end;
  float guidance;

  // any token of the row
  __device__ __forceinline__ float load(int i) const {
    const float x = to_float(cond[i]);
    return sample_clean(uncond ? sample_guided(x, to_float(uncond[i]), guidance) : x);
  }

  __device__ __forceinline__ float at(int i) const { return kKept ? kept[i - first] : load(i); }

  // body(x) for this thread's share
  template <typename Body>
  __device__ __forceinline__ void each(Body body) const {
#pragma unroll(kKept ? 2 : 4)
    for (int i = first + threadIdx.x; i < end; i += kThreads) body(at(i));
  }

  // the largest key of this thread's share, and its lowest token; keeps the values
  __device__ __forceinline__ Amount largest() const {
    Amount best = 0;
#pragma unroll 4
    for (int i = first + threadIdx.x; i < end; i += kThreads) {
      const float x = load(i);
      if constexpr (kKept) kept[i - first] = x;
      best = larger(best, Amount{key_of(x)} << 32 | (0xffffffffu - i));
    }
    return best;
  }
};

// the bin in which the amounts from the highest bin down reach needed_of(all), what is needed of it, and whether that
// is the whole of it
template <bool kMass, bool kCluster, typename Needed>
__device__ void find_bin(Shared& s, Blocks<kCluster>& blocks, int turn, Needed needed_of) {
  const int top = kBins - 1 - 2 * threadIdx.x;
  Amount first = 0, second = 0;
  for (int of = 0; of < blocks.size; ++of) {
    const Amount low = blocks.read(reinterpret_cast<const Amount*>(&s.low[turn][top - 1]), of);
    first += low >> 32;
    second += low & 0xffffffffu;
    if constexpr (!kMass) continue;
    const Amount high = blocks.read(reinterpret_cast<const Amount*>(&s.high[turn][top - 1]), of);
    first += high & ~Amount{0xffffffffu};
    second += high << 32;
  }
  const Amount sum = running_sum(first + second, s);
  if (threadIdx.x == kThreads - 1) s.needed = smaller(needed_of(sum), sum);
  __syncthreads();
  const Amount wanted = s.needed, before = sum - first - second;
  __syncthreads();
  if (before < wanted && wanted <= sum) {
    const bool in_first = wanted <= before + first;
    s.bin = in_first ? top : top - 1;
    s.needed = wanted - before - (in_first ? 0 : first);
    s.whole = s.needed == (in_first ? first : second);
  }
  __syncthreads();
}

// A key that parts the row: amounts of keys from it on reach needed_of(all amounts), or all there are, and those of the
// keys above its own do not. amount_of(x) is 0 for values left out. bits: of a key, those that tell values apart.
template <bool kMass, typename T, bool kCluster, typename Needed, typename AmountOf>
__device__ uint32_t threshold(const Slice<T, kCluster>& row, int bits, Shared& s, Blocks<kCluster>& blocks,
                              Needed needed_of, AmountOf amount_of) {
  static_assert(kBins == 2 * kThreads, "a thread has two bins");
  uint32_t prefix = 0;
#pragma unroll 1
  for (int known = 0; known < bits; known += kBinBits) {
    const int width = known + kBinBits < 32 ? kBinBits : 32 - known, shift = 32 - known - width, turn = blocks.turn;
    blocks.turn ^= 1;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) s.low[turn][bin] = s.high[turn][bin] = 0;
    __syncthreads();
    row.each([&](float x) {
      const uint32_t key = key_of(x);
      if (known && (key ^ prefix) >> (32 - known)) return;
      const Amount amount = amount_of(x);
      if (!amount) return;
      const uint32_t bin = (key >> shift) & ((1u << width) - 1), low = static_cast<uint32_t>(amount);
      const uint32_t before = atomicAdd(&s.low[turn][bin], low);
      if constexpr (!kMass) return;
      const uint32_t high = static_cast<uint32_t>(amount >> 32) + (before > ~low);
      if (high) atomicAdd(&s.high[turn][bin], high);
    });
    blocks.meet();
    const Amount rest = known ? s.needed : 0;
    find_bin<kMass>(s, blocks, turn, [&](Amount all) { return known ? rest : needed_of(all); });
    prefix |= s.bin << shift;
    // smaller keys of the bin stay with it, whatever they are
    if (s.whole) break;
  }
  return prefix;
}

// the smallest key that top-k and top-p leave
template <typename T, bool kCluster>
__device__ uint32_t kept_from(const SampleLogits& p, const Slice<T, kCluster>& row, float largest, Shared& s,
                              Blocks<kCluster>& blocks) {
  // of the lowest finite number
  uint32_t low = key_of(-3.402823466e+38f);
  // float32 of 16-bit values: the lowest 13 bits are the same; guidance fills them
  const int bits = sizeof(T) == 2 && !p.uncond ? 19 : 32;
  if (p.top_k < p.vocab) {
    low = threshold<false>(
        row, bits, s, blocks, [&](Amount) { return static_cast<Amount>(p.top_k); },
        [](float x) { return Amount{x > -kSampleInfinity}; });
  }
  if (!p.top_p) return low;
  return threshold<true>(
      row, bits, s, blocks,
      [&](Amount all) { return static_cast<Amount>(sample_needed(static_cast<int64_t>(all), p.top_p)); },
      [&](float x) -> Amount {
        if (key_of(x) < low) return 0;
        return sample_mass(sample_weight<float, int32_t>(sample_exponent(x, largest, p.scale)));
      });
}

// the race: a thread takes Philox blocks, each of which serves four tokens
template <typename T, bool kCluster>
__device__ void draw(const SampleLogits& p, int64_t row_index, const Slice<T, kCluster>& row, float largest,
                     uint32_t low, Shared& s, Blocks<kCluster>& blocks) {
  const SampleStream stream = sample_stream(p, row_index);
  Amount best = ~Amount{0}, total = 0;
  const int end = (row.end + kSampleTile - 1) / kSampleTile * 16;
#pragma unroll 1
  for (int block = row.first / kSampleTile * 16 + threadIdx.x; block < end; block += kThreads) {
    float weight[4];
    bool any = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = block / 16 * kSampleTile + 16 * j + block % 16;
      const float x = i < row.end ? row.at(i) : -kSampleInfinity;
      const bool kept = x > -kSampleInfinity && key_of(x) >= low;
      const float y = sample_exponent(x, largest, p.scale);
      weight[j] = kept && y >= p.log2_minp ? sample_weight<float, int32_t>(y) : 0.0f;
      any = any || weight[j] != 0;
    }
    if (!any) continue;
    uint32_t word[4] = {static_cast<uint32_t>(block), stream.row, stream.low, stream.high};
    philox(stream.key, word);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (weight[j] == 0) continue;
      total += sample_mass(weight[j]);
      const float time = rounded_div(sample_exponential<float, int32_t>(static_cast<int32_t>(word[j] >> 1)), weight[j]);
      // positive floats are ordered like their bits; the lower index wins a tie
      const uint32_t i = block / 16 * kSampleTile + 16 * j + block % 16;
      best = smaller(best, Amount{bits_of_float(time)} << 32 | i);
    }
  }
  best = reduce(best, s, blocks, smaller);
  if (p.logprob) total = reduce(total, s, blocks, plus);
  if (threadIdx.x || blocks.rank) return;
  const int id = static_cast<int>(best & 0xffffffffu);
  p.ids[row_index] = id;
  if (!p.logprob) return;
  p.logprob[row_index] = sample_logprob(sample_exponent(row.load(id), largest, p.scale), static_cast<int64_t>(total));
}

template <typename T, bool kCluster>
__device__ __forceinline__ void sample_row(const SampleLogits& p, Shared& s, Blocks<kCluster>& blocks) {
  const int64_t index = blockIdx.x / blocks.size;
  const int vocab = static_cast<int>(p.vocab), tiles = (vocab + kSampleTile - 1) / kSampleTile;
  const int slice = (tiles + blocks.size - 1) / blocks.size * kSampleTile;
  const int first = blocks.rank * slice < vocab ? blocks.rank * slice : vocab;
  const T *cond = static_cast<const T*>(p.logits), *uncond = static_cast<const T*>(p.uncond);
  const Slice<T, kCluster> row{cond + index * p.logits_stride,
                               uncond ? uncond + index * p.uncond_stride : nullptr,
                               reinterpret_cast<float*>(&s + 1),
                               first,
                               first + slice < vocab ? first + slice : vocab,
                               p.guidance};
  const Amount top = reduce(row.largest(), s, blocks, larger);
  const float largest = float_of_key(static_cast<uint32_t>(top >> 32));
  const bool blank = largest == -kSampleInfinity;
  if (blank || p.scale == 0) {
    if (threadIdx.x || blocks.rank) return;
    p.ids[index] = 0xffffffffu - static_cast<uint32_t>(top);
    if (p.logprob) p.logprob[index] = blank ? __int_as_float(0x7fc00000) : 0.0f;
    return;
  }
  const uint32_t low = kept_from(p, row, largest, s, blocks);
  draw(p, index, row, largest, low, s, blocks);
}

template <typename T, bool kCluster>
__global__ void __launch_bounds__(kThreads) sample_logits_kernel(const __grid_constant__ SampleLogits p) {
  Shared& s = *ptx::dynamic_shared<Shared>();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  Blocks<kCluster> blocks;
  sample_row<T, kCluster>(p, s, blocks);
  // the others read this block's shared memory
  if constexpr (kCluster) blocks.meet();
}

bool device_has_clusters() {
  int device = 0, major = 0;
  check_launch("sample_logits", cudaGetDevice(&device));
  check_launch("sample_logits", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

template <typename T>
void sample(const SampleLogits& p, cudaStream_t stream) {
  unsigned blocks = 1;
  while (blocks < kMostBlocks && p.vocab > blocks * kSlice) blocks *= 2;
  if (blocks == 1 || !device_has_clusters()) {
    const Launch at{"sample_logits", static_cast<unsigned>(p.n), kThreads, stream, sizeof(Shared), 1, true};
    return launch(at, sample_logits_kernel<T, false>, p);
  }
  const int64_t tiles = (p.vocab + kSampleTile - 1) / kSampleTile;
  const unsigned slice = static_cast<unsigned>((tiles + blocks - 1) / blocks * kSampleTile);
  const unsigned bytes = sizeof(Shared) + slice * sizeof(float);
  const Launch at{"sample_logits", static_cast<unsigned>(p.n) * blocks, kThreads, stream, bytes, blocks, true};
  launch(at, sample_logits_kernel<T, true>, p);
}

}  // namespace

void sample_logits_launch(const SampleLogits& p, void* stream) {
  if (p.dtype == Dtype::f32) sample<float>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::bf16) sample<bf16>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::f16) sample<f16>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace flexkernels::cuda
