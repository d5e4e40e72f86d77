// The stream of a persistent step: all weights, old keys and old values that a block needs, in the order in which it
// needs them, through a ring of tiles in shared memory. One thread issues the copies and knows nothing of what the
// blocks wait for; sixteen warps take the tiles in the same order.
#pragma once

#include "../core/transformer.h"
#include "ptx.h"

namespace flexkernels::cuda::step {

constexpr int kWarps = 16, kConsumers = 32 * kWarps, kThreads = kConsumers + 32;
constexpr int kTileBits = 14, kTile = 1 << kTileBits;
// a warp's channels of a row at a time; a matrix is read in runs of 8 rows, each of whole rows
constexpr int kBlock = 64, kRun = 8;
// rows of a matrix whose sums are in shared memory together, as three pairs of runs
constexpr int kBatchRuns = 6, kBatchRows = kRun * kBatchRuns;
// floats of the sixteen warps' parts of one sum; 80 bytes, so that four lanes read four banks
constexpr int kPitch = 20;

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// n rows over the blocks: `each` a block, and one more for the first `more`
struct Division {
  int each, more;
};

// what the host counts once instead of every thread in every phase
struct Counted {
  int slots;        // tiles of the ring
  int column_bits;  // of the rows of x, as columns of a product come: 2 to this power
  Division qkv, width, hidden;
  float inverse_width;
};

// this block's part
struct Share {
  int begin, count;
  explicit __device__ Share(const Division& of) {
    const int block = blockIdx.x, more = of.more;
    begin = block * of.each + smaller(block, more);
    count = of.each + (block < more ? 1 : 0);
  }
};

// where a warp or the producer stands in the ring
struct Cursor {
  int slot = 0, slots;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++slot < slots) return;
    slot = 0;
    parity ^= 1;
  }
};

struct Shared {
  unsigned char* ring;
  float *sums, *squares, *residual;
  uint64_t *full, *empty;
};

// pairs of rows of x, as columns of a product come
FLEXKERNELS_HD int padded_rows(int rows) { return rows <= 2 ? 2 : rows <= 4 ? 4 : 8; }

// floats of squares, of any number of rows: so the sums behind them are at a fixed distance, which takes no register
constexpr int kSquares = kStepMaxRows * kPitch;

// bytes of shared memory beside the ring: squares, sums of a batch or of attention's warps, residual, barriers
FLEXKERNELS_HD int64_t shared_floats(const TransformerStep& p) {
  const int64_t sums = kBatchRows * padded_rows(p.rows) * kPitch, attention = kWarps * (p.head_dim + 2);
  return sums > attention ? sums : attention;
}
FLEXKERNELS_HD int64_t shared_beside_ring(const TransformerStep& p, int blocks, int slots) {
  const int64_t rows = padded_rows(p.rows), owned = (p.width + blocks - 1) / blocks;
  return 4 * (kSquares + shared_floats(p) + (rows * owned + 3) / 4 * 4) + 16 * slots;
}

__device__ inline Shared carve(const TransformerStep& p, int slots) {
  Shared s;
  s.ring = ptx::dynamic_shared<unsigned char>();
  s.squares = reinterpret_cast<float*>(s.ring + static_cast<int64_t>(slots) * kTile);
  s.sums = s.squares + kSquares;
  s.residual = s.sums + shared_floats(p);
  const int owned = padded_rows(p.rows) * ceil_div(p.width, gridDim.x);
  s.full = reinterpret_cast<uint64_t*>(s.residual + (owned + 3) / 4 * 4);
  s.empty = s.full + slots;
  return s;
}

// one unit of attention: a head of a row, and one of its ranges of old keys
struct Unit {
  int row, head, split, begin, end;

  // `fresh`: the last key of the row is not in the cache yet
  __device__ Unit(const TransformerStep& p, const StepKeys& keys, int number, bool fresh) {
    const unsigned heads = p.heads, of_all = static_cast<unsigned>(number) / kStepSplits;
    split = number % kStepSplits;
    row = of_all / heads;
    head = of_all - row * heads;
    const int length = keys.length[fresh ? row : row % p.contexts];
    // a length outside of the cache is cut to it
    const int most = static_cast<int>(keys.max_len),
              old = smaller(larger(length, fresh ? 1 : 0), most) - (fresh ? 1 : 0);
    const int each = ceil_div(old, kStepSplits);
    begin = smaller(split * each, old);
    end = smaller(begin + each, old);
  }
};

__device__ __forceinline__ int units(const TransformerStep& p) { return p.rows * p.heads * kStepSplits; }
// head_dim is 2 to this power
__device__ __forceinline__ int head_bits(const TransformerStep& p) { return p.head_dim == 64 ? 6 : 7; }
// keys of a tile: one for every head_dim / 8 lanes of all warps
__device__ __forceinline__ int tile_keys(const TransformerStep& p) { return kConsumers * 8 >> head_bits(p); }

template <bool kInt8>
struct Producer {
  const TransformerStep& p;
  const Counted& counted;
  const Shared& s;
  Cursor at;
  uint64_t policy;

  __device__ unsigned char* take(uint32_t bytes) {
    ptx::mbarrier_wait(s.empty + at.slot, at.parity ^ 1);
    ptx::mbarrier_expect(s.full + at.slot, bytes);
    return s.ring + static_cast<int64_t>(at.slot) * kTile;
  }
  __device__ void copy(unsigned char* to, const void* from, int bytes) {
    ptx::bulk_copy(to, from, bytes, s.full + at.slot, policy);
  }
  __device__ void run(const void* weight, int64_t row, int rows, int k) {
    const int64_t row_bytes = kInt8 ? k : 2 * k;
    const unsigned char* from = static_cast<const unsigned char*>(weight) + row * row_bytes;
#pragma unroll 1
    for (int offset = 0, bytes = static_cast<int>(rows * row_bytes); offset < bytes; offset += kTile) {
      const int n = smaller(kTile, bytes - offset);
      copy(take(n), from + offset, n);
      at.next();
    }
  }
  __device__ void linear(const StepMatrix& m, const Division& n, int k) {
    const Share rows(n);
#pragma unroll 1
    for (int i = 0; i < rows.count; i += kRun) run(m.weight, rows.begin + i, smaller(kRun, rows.count - i), k);
  }
  // runs of w1 and of w3 take turns
  __device__ void gated(const StepMatrix& m) {
    const Share rows(counted.hidden);
#pragma unroll 1
    for (int i = 0; i < rows.count; i += kRun) {
      const int n = smaller(kRun, rows.count - i);
      run(m.weight, rows.begin + i, n, p.width);
      run(m.weight, p.hidden + rows.begin + i, n, p.width);
    }
  }
  __device__ void rows_of(const unsigned char* from, int64_t stride, unsigned char* to, int n) {
    const int bytes = 2 * p.head_dim;
    if (stride == p.head_dim) return copy(to, from, n * bytes);
#pragma unroll 1
    for (int i = 0; i < n; ++i) copy(to + i * bytes, from + 2 * i * stride, bytes);
  }
  __device__ void keys(const void* k, const void* v, const StepKeys& of, bool fresh) {
    const int per_tile = tile_keys(p);
#pragma unroll 1
    for (int number = blockIdx.x; number < units(p); number += gridDim.x) {
      const Unit u(p, of, number, fresh);
      const int row = fresh ? u.row : u.row % p.contexts;
      const auto place = [&](const void* cache, const int64_t (&stride)[3], int t) {
        return static_cast<const unsigned char*>(cache) + 2 * (row * stride[0] + u.head * stride[1] + t * stride[2]);
      };
#pragma unroll 1
      for (int t = u.begin; t < u.end; t += per_tile) {
        const int n = smaller(per_tile, u.end - t);
        unsigned char* to = take(4 * n * p.head_dim);
        rows_of(place(k, of.k_stride, t), of.k_stride[2], to, n);
        rows_of(place(v, of.v_stride, t), of.v_stride[2], to + kTile / 2, n);
        at.next();
      }
    }
  }
  // in the order of Consumer::step
  __device__ void step() {
    const unsigned char *k = static_cast<const unsigned char*>(p.k), *v = static_cast<const unsigned char*>(p.v);
#pragma unroll 1
    for (int i = 0; i < p.layers; ++i) {
      const StepLayer& layer = p.layer[i];
      linear(layer.qkv, counted.qkv, p.width);
      keys(k + 2 * i * p.k_layer, v + 2 * i * p.v_layer, p.keys, true);
      linear(layer.proj, counted.width, p.width);
      if (p.contexts) {
        linear(layer.cross_q, counted.width, p.width);
        keys(layer.cross_k, layer.cross_v, p.cross, false);
        linear(layer.cross_proj, counted.width, p.width);
      }
      gated(layer.w13);
      linear(layer.w2, counted.width, p.hidden);
    }
  }
};

}  // namespace flexkernels::cuda::step
