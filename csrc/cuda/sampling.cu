// Sampling. A cluster of up to 8 blocks has a row, each block a slice of it: the slice is read once, guided, and kept
// as float32 in shared memory. Vocabularies up to 4,096, and GPUs before sm_90, which have no clusters, take one block
// a row that reads it again for every pass.
//
// The largest value, the thresholds of top-k (by count) and of top-p (by mass) and the winner of the race are found by
// all blocks together (sampling_search.h). The first round of top-k is counted while the row is read; where it leaves
// few tokens, as it does for a k of hundreds, those go to the first block, which finishes alone while the others make
// room for the next row.
//
// Paper count for 64,000 float32, top-k 100 and top-p, two blocks of 512 threads on a multiprocessor: start 1.2 us, 16
// loads a thread in two trips 2, counting 1.5, the largest 0.6, the bin 1, moving candidates 0.7, five rounds of one
// block 3, the race 1: 11 us. Without top-k the race costs most: 16 tokens a thread, 85 instructions each and 90 more
// for about five of them, whose logarithm is taken: 3 us.
#include "sampling_search.h"

#include "kernels.h"
#include "launch.h"
#include "pack.h"

namespace flexkernels::cuda {
namespace {

// two blocks of a cluster find room on a multiprocessor, so that one works while the other waits
template <bool kCluster>
constexpr int kThreads = kCluster ? 512 : 1024;
// tokens for a block, where a cluster can have more blocks
constexpr int64_t kSlice = 4096;

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
    for (int i = first + threadIdx.x; i < end; i += kThreads<kKept>) body(at(i));
  }

  // the largest key of this thread's share, and its lowest token; keeps the values; body(x, key) for each of them
  template <typename Body>
  __device__ __forceinline__ Amount largest(Body body) const {
    constexpr int kAhead = kKept ? 8 : 4;
    Amount best = 0;
    for (int begin = first + threadIdx.x; begin < end; begin += kAhead * kThreads<kKept>) {
      float x[kAhead];
      // all are under way before the first is used
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = begin + k * kThreads<kKept>;
        x[k] = load(i < end ? i : end - 1);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = begin + k * kThreads<kKept>;
        if (i >= end) break;
        if constexpr (kKept) kept[i - first] = x[k];
        const uint32_t key = key_of(x[k]);
        best = larger(best, Amount{key} << 32 | (0xffffffffu - i));
        body(x[k], key);
      }
    }
    return best;
  }
};

// tokens of a row in shared memory, in any order
struct Candidates {
  const float* value;
  const uint32_t* token;
  int count;

  template <typename Body>
  __device__ __forceinline__ void each(Body body) const {
    for (int i = threadIdx.x; i < count; i += blockDim.x) body(value[i]);
  }
};

// those of all blocks from this key on, at most kListed, to the first block
template <typename T, bool kCluster>
__device__ void gather(const Slice<T, kCluster>& row, uint32_t from, Shared& s, const Blocks<kCluster>& blocks) {
  // the next round's bins are not in use yet
  uint32_t *values = s.low[blocks.turn], *tokens = values + kListed;
#pragma unroll 4
  for (int i = row.first + threadIdx.x; i < row.end; i += kThreads<kCluster>) {
    const float x = row.at(i);
    if (key_of(x) < from) continue;
    const uint32_t at = atomicAdd(&s.found, 1u);
    values[at] = bits_of_float(x);
    tokens[at] = i;
  }
  __syncthreads();
  if (threadIdx.x == 0) s.begin = blocks.add_to_first(&s.listed, s.found);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < s.found; i += kThreads<kCluster>) {
    blocks.give(&s.value[s.begin + i], float_of_bits(values[i]));
    blocks.give(&s.token[s.begin + i], tokens[i]);
  }
  blocks.meet();
}

// the smallest key that top-k and top-p leave; top_k: where its search stands
template <typename Row, bool kCluster>
__device__ uint32_t kept_from(const SampleLogits& p, const Row& row, Found top_k, int bits, float largest, Shared& s,
                              Blocks<kCluster>& blocks) {
  uint32_t low = top_k.prefix;
  if (p.top_k < p.vocab) {
    low = threshold<false>(
        row, top_k, bits, s, blocks, [&](Amount) { return static_cast<Amount>(p.top_k); },
        [](float x) { return Amount{x > -kSampleInfinity}; });
  }
  if (!p.top_p) return low;
  return threshold<true>(
      row, Found{0, 0}, bits, s, blocks,
      [&](Amount all) { return static_cast<Amount>(sample_needed(static_cast<int64_t>(all), p.top_p)); },
      [&](float x) -> Amount {
        if (key_of(x) < low) return 0;
        return sample_mass(sample_weight<float, int32_t>(sample_exponent(x, largest, p.scale)));
      });
}

// what wins the race so far, time above token, and the mass that takes part
struct Race {
  Amount best = ~Amount{0}, total = 0;

  __device__ __forceinline__ void enter(uint32_t token, float weight, uint32_t word) {
    const float time = rounded_div(sample_exponential<float, int32_t>(static_cast<int32_t>(word >> 1)), weight);
    // positive floats are ordered like their bits; the lower index wins a tie
    best = smaller(best, Amount{bits_of_float(time)} << 32 | token);
  }

  // the warp's shortest time
  __device__ __forceinline__ float shortest() const {
    const uint32_t time = __reduce_min_sync(kAll, static_cast<uint32_t>(best >> 32));
    // nobody has entered
    return time == 0xffffffffu ? kSampleInfinity : float_of_bits(time);
  }
};

// false where the token's time is surely longer than `limit`: an exponential variate is at least its u, up to what its
// arithmetic is off by, a few 2^-23
__device__ __forceinline__ bool may_win(float weight, uint32_t word, float limit) {
  const float u = sample_uniform<float, int32_t>(static_cast<int32_t>(word >> 1));
  return u <= limit * weight * (1 + 0x1p-19f);
}

// 0 for a token that is left out
__device__ __forceinline__ float weight_of(const SampleLogits& p, float x, float largest, uint32_t low) {
  const bool kept = x > -kSampleInfinity && key_of(x) >= low;
  const float y = sample_exponent(x, largest, p.scale);
  return kept && y >= p.log2_minp ? sample_weight<float, int32_t>(y) : 0.0f;
}

// a thread takes Philox blocks, each of which serves four tokens; most tokens are told from the winner without their
// logarithm
template <typename T, bool kCluster>
__device__ Race race_of(const SampleLogits& p, const SampleStream& stream, const Slice<T, kCluster>& row, float largest,
                        uint32_t low) {
  Race race;
  float limit = kSampleInfinity;
  const int end = (row.end + kSampleTile - 1) / kSampleTile * 16;
#pragma unroll 1
  for (int begin = row.first / kSampleTile * 16; begin < end; begin += kThreads<kCluster>) {
    const int block = begin + threadIdx.x, token = block / 16 * kSampleTile + block % 16;
    float weight[4];
    bool any = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = token + 16 * j;
      weight[j] = weight_of(p, i < row.end ? row.at(i) : -kSampleInfinity, largest, low);
      any = any || weight[j] != 0;
    }
    if (any) {
      uint32_t word[4] = {static_cast<uint32_t>(block), stream.row, stream.low, stream.high};
      philox(stream.key, word);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (weight[j] == 0) continue;
        if (p.logprob) race.total += sample_mass(weight[j]);
        if (may_win(weight[j], word[j], limit)) race.enter(token + 16 * j, weight[j], word[j]);
      }
    }
    limit = race.shortest();
  }
  return race;
}

// a thread takes candidates, and of a Philox block the one word that is theirs
__device__ Race race_of(const SampleLogits& p, const SampleStream& stream, const Candidates& row, float largest,
                        uint32_t low) {
  Race race;
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
    const float weight = weight_of(p, row.value[i], largest, low);
    if (weight == 0) continue;
    const uint32_t token = row.token[i], j = token / 16 % 4;
    uint32_t word[4] = {token / kSampleTile * 16 + token % 16, stream.row, stream.low, stream.high};
    philox(stream.key, word);
    if (p.logprob) race.total += sample_mass(weight);
    race.enter(token, weight, j < 2 ? (j ? word[1] : word[0]) : (j == 2 ? word[2] : word[3]));
  }
  return race;
}

// the row's id, from the slices of all blocks or from candidates in one
template <typename T, typename Row, bool kKept, bool kCluster>
__device__ void draw(const SampleLogits& p, int64_t index, const Slice<T, kKept>& logits, const Row& row, float largest,
                     uint32_t low, Shared& s, Blocks<kCluster>& blocks) {
  const Race race = race_of(p, sample_stream(p, index), row, largest, low);
  const Amount best = reduce(race.best, s, blocks, smaller);
  const Amount total = p.logprob ? reduce(race.total, s, blocks, plus) : 0;
  if (threadIdx.x || blocks.rank) return;
  const int id = static_cast<int>(best & 0xffffffffu);
  p.ids[index] = id;
  if (!p.logprob) return;
  p.logprob[index] = sample_logprob(sample_exponent(logits.load(id), largest, p.scale), static_cast<int64_t>(total));
}

// whether other blocks may still read this one's shared memory
template <typename T, bool kCluster>
__device__ __forceinline__ bool sample_row(const SampleLogits& p, Shared& s, Blocks<kCluster>& blocks) {
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
  const bool counted = p.scale != 0 && p.top_k < p.vocab;
  const int turn = blocks.take_turn();
  clear_bins<false>(s, turn);
  if (threadIdx.x == 0) s.found = s.listed = 0;
  __syncthreads();
  const Amount own = row.largest([&](float x, uint32_t key) {
    if (counted && x > -kSampleInfinity) add_to_bin<false>(s, turn, key >> (32 - kBinBits), 1);
  });
  const Amount top = reduce(own, s, blocks, larger);
  const float largest = float_of_key(static_cast<uint32_t>(top >> 32));
  const bool blank = largest == -kSampleInfinity;
  if (blank || p.scale == 0) {
    if (threadIdx.x || blocks.rank) return true;
    p.ids[index] = 0xffffffffu - static_cast<uint32_t>(top);
    if (p.logprob) p.logprob[index] = blank ? __int_as_float(0x7fc00000) : 0.0f;
    return true;
  }
  // float32 of 16-bit values: the lowest 13 bits are the same; guidance fills them
  const int bits = sizeof(T) == 2 && !p.uncond ? 19 : 32;
  // of the lowest finite number
  Found top_k{key_of(-3.402823466e+38f), 0};
  if (counted) {
    find_bin<false>(s, blocks, turn, [&](Amount) { return static_cast<Amount>(p.top_k); });
    top_k = Found{s.bin << (32 - kBinBits), s.whole ? 32 : kBinBits};
    if (s.reached <= kListed) {
      gather(row, top_k.prefix, s, blocks);
      if (blocks.rank) return false;
      const Candidates candidates{s.value, s.token, static_cast<int>(s.listed)};
      Blocks<false> alone;
      alone.turn = blocks.turn;
      const uint32_t low = kept_from(p, candidates, top_k, bits, largest, s, alone);
      draw(p, index, row, candidates, largest, low, s, alone);
      return false;
    }
  }
  const uint32_t low = kept_from(p, row, top_k, bits, largest, s, blocks);
  draw(p, index, row, row, largest, low, s, blocks);
  return true;
}

template <typename T, bool kCluster>
__global__ void __launch_bounds__(kThreads<kCluster>, kCluster ? 2 : 1)
    sample_logits_kernel(const __grid_constant__ SampleLogits p) {
  Shared& s = *ptx::dynamic_shared<Shared>();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  Blocks<kCluster> blocks;
  if (sample_row<T, kCluster>(p, s, blocks)) blocks.meet();
}

// clusters, and room for a block's part of the row
bool device_holds(unsigned bytes) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
         bytes <= static_cast<unsigned>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <typename T>
void sample(const SampleLogits& p, cudaStream_t stream) {
  unsigned blocks = 1;
  while (blocks < unsigned{kMostBlocks} && p.vocab > blocks * kSlice) blocks *= 2;
  const int64_t tiles = (p.vocab + kSampleTile - 1) / kSampleTile;
  const unsigned slice = static_cast<unsigned>((tiles + blocks - 1) / blocks * kSampleTile);
  const unsigned bytes = sizeof(Shared) + slice * sizeof(float);
  if (blocks == 1 || !device_holds(bytes)) {
    const Launch at{"sample_logits", static_cast<unsigned>(p.n), kThreads<false>, stream, sizeof(Shared), 1, true};
    return launch(at, sample_logits_kernel<T, false>, p);
  }
  const Launch at{"sample_logits", static_cast<unsigned>(p.n) * blocks, kThreads<true>, stream, bytes, blocks, true};
  launch(at, sample_logits_kernel<T, true>, p);
}

}  // namespace

void sample_logits_launch(const SampleLogits& p, void* stream) {
  if (p.dtype == Dtype::f32) sample<float>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::bf16) sample<bf16>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::f16) sample<f16>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace flexkernels::cuda
