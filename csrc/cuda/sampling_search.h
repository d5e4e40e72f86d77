// What the blocks of a row find out together: the best of a value, and the bin in which amounts reach what is needed.
//
// A threshold is a radix selection over the ordered bits of floats, 11 bits a round: each block adds its slice to bins
// of its own and sums groups of 64 of them, the cluster meets once, then one warp of every block adds up the groups of
// all blocks, and after them the bins of the one group that matters: 768 words from each block, not all 4,096. Buffers
// alternate: what a block overwrites was read by the others before they came to the meeting before. Counts and masses
// are integers, so no order of additions shows in a result.
#pragma once

#include "../core/sampling.h"
#include "ptx.h"

namespace flexkernels::cuda {

constexpr int kBinBits = 11, kBins = 1 << kBinBits;
constexpr int kGroups = 32, kGroupBins = kBins / kGroups;
// blocks of a cluster
constexpr int kMostBlocks = 8;
// candidates that one block takes over from all
constexpr int kListed = kBins / 2;
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
  Amount of_group[2][kGroups];
  Amount of_warp[32];
  Amount of_block[2];
  // of the bin that was found: what is needed of its amount, all from the highest bin down to it, whether the whole is
  // needed
  Amount needed, reached;
  uint32_t bin;
  bool whole;
  // candidates of this block, where its own begin among all, and in the first block all of them
  uint32_t found, begin, listed;
  float value[kListed];
  uint32_t token[kListed];
};

__device__ __forceinline__ Amount larger(Amount a, Amount b) { return a > b ? a : b; }
__device__ __forceinline__ Amount smaller(Amount a, Amount b) { return a < b ? a : b; }
__device__ __forceinline__ Amount plus(Amount a, Amount b) { return a + b; }

// the blocks that share a row, and which of two buffers are next: of bins and of reduce()
template <bool kCluster>
struct Blocks {
  static constexpr int kMost = kCluster ? kMostBlocks : 1;
  int rank = 0, size = 1, turn = 0, reduced = 0;

  __device__ __forceinline__ Blocks() {
    if constexpr (kCluster && kHasClusters) {
      rank = ptx::cluster_rank();
      size = ptx::cluster_size();
    }
  }

  __device__ __forceinline__ int take_turn() {
    turn ^= 1;
    return turn ^ 1;
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

  // the sum over the blocks, whose loads are all under way at once; the size is a power of two
  __device__ __forceinline__ Amount total(const Amount* shared) const {
    Amount of_block[kMost], sum = 0;
#pragma unroll
    for (int of = 0; of < kMost; ++of) of_block[of] = read(shared, of & (size - 1));
#pragma unroll
    for (int of = 0; of < kMost; ++of) sum += of < size ? of_block[of] : 0;
    return sum;
  }

  // to the first block's memory
  template <typename X>
  __device__ __forceinline__ void give(X* shared, X x) const {
    if constexpr (kCluster && kHasClusters) return ptx::cluster_store(shared, 0, x);
    *shared = x;
  }
  __device__ __forceinline__ uint32_t add_to_first(uint32_t* shared, uint32_t x) const {
    if constexpr (kCluster && kHasClusters) return ptx::cluster_add(shared, 0, x);
    return atomicAdd(shared, x);
  }
};

// the row's result in every thread
template <bool kCluster, typename Combine>
__device__ Amount reduce(Amount value, Shared& s, Blocks<kCluster>& blocks, Combine combine) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kAll, value, step));
  // the last call's results have been read
  __syncthreads();
  if (lane == 0) s.of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  // lanes that are as many as there are values (a power of two) have each of them once
  value = s.of_warp[lane % warps];
  for (int step = 1; step < warps; step *= 2) value = combine(value, __shfl_xor_sync(kAll, value, step));
  if constexpr (!kCluster) return value;
  Amount& mine = s.of_block[blocks.reduced];
  blocks.reduced ^= 1;
  if (threadIdx.x == 0) mine = value;
  blocks.meet();
  value = blocks.read(&mine, lane % blocks.size);
  for (int step = 1; step < blocks.size; step *= 2) value = combine(value, __shfl_xor_sync(kAll, value, step));
  return value;
}

// the sum over the lanes up to this one
__device__ __forceinline__ Amount running_sum(Amount value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Amount before = __shfl_up_sync(kAll, value, step);
    if (threadIdx.x % 32 >= step) value += before;
  }
  return value;
}

// floats, without NaN and -0, as integers in their order
__device__ __forceinline__ uint32_t key_of(float x) { return static_cast<uint32_t>(order_of_float(x)) ^ 0x80000000u; }
__device__ __forceinline__ float float_of_key(uint32_t key) {
  return float_of_order(static_cast<int32_t>(key ^ 0x80000000u));
}

// all threads of the block, which meet before they add
template <bool kMass>
__device__ __forceinline__ void clear_bins(Shared& s, int turn) {
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    s.low[turn][bin] = 0;
    if constexpr (kMass) s.high[turn][bin] = 0;
  }
}

template <bool kMass>
__device__ __forceinline__ void add_to_bin(Shared& s, int turn, uint32_t bin, Amount amount) {
  const uint32_t low = static_cast<uint32_t>(amount);
  const uint32_t before = atomicAdd(&s.low[turn][bin], low);
  if constexpr (!kMass) return;
  const uint32_t high = static_cast<uint32_t>(amount >> 32) + (before > ~low);
  if (high) atomicAdd(&s.high[turn][bin], high);
}

// adds the words of the bins `top` - 1 and `top` in all blocks, the loads of which are under way at once
template <bool kCluster>
__device__ __forceinline__ void add_words(const uint32_t* bins, int top, int shift, const Blocks<kCluster>& blocks,
                                          Amount& first, Amount& second) {
  Amount words[Blocks<kCluster>::kMost];
#pragma unroll
  for (int of = 0; of < Blocks<kCluster>::kMost; ++of) {
    words[of] = blocks.read(reinterpret_cast<const Amount*>(bins + top - 1), of & (blocks.size - 1));
  }
#pragma unroll
  for (int of = 0; of < Blocks<kCluster>::kMost; ++of) {
    if (of >= blocks.size) continue;
    first += (words[of] >> 32) << shift;
    second += (words[of] & 0xffffffffu) << shift;
  }
}

// amounts of the bins `top` and `top` - 1 in all blocks
template <bool kMass, bool kCluster>
__device__ __forceinline__ void pair_of(const Shared& s, const Blocks<kCluster>& blocks, int turn, int top,
                                        Amount& first, Amount& second) {
  first = second = 0;
  add_words(s.low[turn], top, 0, blocks, first, second);
  if constexpr (kMass) add_words(s.high[turn], top, 32, blocks, first, second);
}

// after all have added: the bin in which the amounts from the highest bin down reach needed_of(all)
template <bool kMass, bool kCluster, typename Needed>
__device__ void find_bin(Shared& s, const Blocks<kCluster>& blocks, int turn, Needed needed_of) {
  const int lane = threadIdx.x % 32;
  Amount first, second;
  __syncthreads();
  for (int group = threadIdx.x / 32; group < kGroups; group += blockDim.x / 32) {
    pair_of<kMass>(s, Blocks<false>(), turn, group * kGroupBins + 2 * lane + 1, first, second);
    Amount sum = first + second;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (lane == 0) s.of_group[turn][group] = sum;
  }
  blocks.meet();
  if (threadIdx.x < 32) {
    const Amount group = blocks.total(&s.of_group[turn][kGroups - 1 - lane]);
    const Amount groups = running_sum(group), all = __shfl_sync(kAll, groups, 31);
    const Amount wanted = smaller(needed_of(all), all);
    const int at = __ffs(__ballot_sync(kAll, groups >= wanted)) - 1;
    const int top = (kGroups - at) * kGroupBins - 1 - 2 * lane;
    pair_of<kMass>(s, blocks, turn, top, first, second);
    const Amount above = __shfl_sync(kAll, groups - group, at);
    const Amount reached = above + running_sum(first + second);
    if (lane == __ffs(__ballot_sync(kAll, reached >= wanted)) - 1) {
      const Amount before = reached - first - second;
      const bool in_first = wanted <= before + first;
      s.bin = in_first ? top : top - 1;
      s.needed = wanted - before - (in_first ? 0 : first);
      s.whole = s.needed == (in_first ? first : second);
      s.reached = reached - (in_first ? second : 0);
    }
  }
  __syncthreads();
}

// The highest bits of keys, where a search stands: those of keys from `prefix` on reach what is needed.
struct Found {
  uint32_t prefix;
  int known;
};

// A key that parts the row: amounts of keys from it on reach needed_of(all amounts), or all there are, and those of the
// keys above its own do not. amount_of(x) is 0 for values left out. bits: of a key, those that tell values apart.
// from: nothing known, or the first round's bin, which find_bin() has just found.
template <bool kMass, typename Row, bool kCluster, typename Needed, typename AmountOf>
__device__ uint32_t threshold(const Row& row, Found from, int bits, Shared& s, Blocks<kCluster>& blocks,
                              Needed needed_of, AmountOf amount_of) {
  uint32_t prefix = from.prefix;
#pragma unroll 1
  for (int known = from.known; known < bits; known += kBinBits) {
    const int width = known + kBinBits < 32 ? kBinBits : 32 - known, shift = 32 - known - width;
    const int turn = blocks.take_turn();
    clear_bins<kMass>(s, turn);
    __syncthreads();
    row.each([&](float x) {
      const uint32_t key = key_of(x);
      if (known && (key ^ prefix) >> (32 - known)) return;
      const Amount amount = amount_of(x);
      if (amount) add_to_bin<kMass>(s, turn, (key >> shift) & ((1u << width) - 1), amount);
    });
    const Amount rest = known ? s.needed : 0;
    find_bin<kMass>(s, blocks, turn, [&](Amount all) { return known ? rest : needed_of(all); });
    prefix |= s.bin << shift;
    // smaller keys of the bin stay with it, whatever they are
    if (s.whole) break;
  }
  return prefix;
}

}  // namespace flexkernels::cuda
