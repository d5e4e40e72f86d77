// A matrix of a persistent step against the rows of activations, by the sixteen warps of a block.
//
// The block has some rows of the matrix; they come in runs of 8, of which two are the 16 rows of mma.sync's A. The rows
// of activations are the 8 columns of its B. A warp takes blocks of 64 channels, every sixteenth; the order of the
// channels inside of a block is free, so that lane (g, t) = (lane / 4, lane % 4) reads whole 16 bytes of row g:
// channels 8 t .. 8 t + 7 of each half of a block, of int8 16 t .. 16 t + 15. The sixteen parts of a sum are added in
// shared memory in one order. The first runs go into registers before the activations are there.
#pragma once

#include "step_ring.h"
#include "step_words.h"

namespace flexkernels::cuda::step {

// words of a lane's channels of a block: of a matrix, and of activations
template <bool kInt8>
constexpr int kWeights = kInt8 ? 4 : 8;
constexpr int kValues = 8;

// a lane's four quarters of a block of activations, each four channels: the first channel of quarter i
template <bool kInt8>
__device__ __forceinline__ int quarter(int t, int i) {
  return kInt8 ? 16 * t + 4 * i : 32 * (i / 2) + 8 * t + 4 * (i % 2);
}

// four channels as the two pairs that meet a lane's weights: widened int8 come as channels 0 and 2, 1 and 3
template <typename T, bool kInt8>
__device__ __forceinline__ void pack_quarter(const float (&f)[4], uint32_t* to) {
  to[0] = pack_pair<T>(f[0], f[kInt8 ? 2 : 1]);
  to[1] = pack_pair<T>(f[kInt8 ? 1 : 2], f[3]);
}
template <bool kInt8>
__device__ __forceinline__ void pack_quarter(const uint4& v, uint32_t* to) {
  to[0] = pair(v.x, kInt8 ? v.z : v.y);
  to[1] = pair(kInt8 ? v.y : v.z, v.w);
}

template <typename T, bool kInt8>
struct Lanes {
  static constexpr int kW = kWeights<kInt8>;

  const TransformerStep& p;
  const Shared& s;
  Cursor at;
  int warp, lane, g, t;

  __device__ Lanes(const TransformerStep& p, const Shared& s, int slots) : p(p), s(s) {
    at.slots = slots;
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  }

  static __device__ __forceinline__ void sync() { ptx::barrier_sync(1, kConsumers); }

  // the next `tiles` tiles are there; returns where they begin
  __device__ __forceinline__ Cursor wait(int tiles) {
    const Cursor first = at;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i, at.next()) ptx::mbarrier_wait(s.full + at.slot, at.parity);
    return first;
  }
  // the warp has read them
  __device__ __forceinline__ void release(Cursor from, int tiles) {
    __syncwarp();
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < tiles; ++i, from.next()) ptx::mbarrier_arrive(s.empty + from.slot);
    }
  }

  // a run of `rows` rows of k channels, in tiles from `first`
  struct Run {
    int rows, row_bytes;
    __device__ __forceinline__ int tiles() const { return (rows * row_bytes + kTile - 1) >> kTileBits; }
  };

  // row g of block i of this warp. Rows are whole numbers of 128 (of int8 64) bytes, so neighbouring rows would read
  // the same banks: an odd row reads its halves in the other order
  __device__ __forceinline__ void fragment(const Run& run, const Cursor& first, int i, int blocks, uint32_t (&w)[kW]) {
    const int block = warp + kWarps * i;
#pragma unroll
    for (int j = 0; j < kW; ++j) w[j] = 0;
    if (g >= run.rows || block >= blocks) return;
    const int offset = g * run.row_bytes + block * (kInt8 ? kBlock : 2 * kBlock);
    int slot = first.slot + (offset >> kTileBits);
    if (slot >= at.slots) slot -= at.slots;
    const unsigned char* from = s.ring + (slot << kTileBits) + (offset & (kTile - 1)) + 16 * t;
    if constexpr (kInt8) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
      const int odd = g & 1;
      const uint4 u = *reinterpret_cast<const uint4*>(from + 64 * odd);
      const uint4 v = *reinterpret_cast<const uint4*>(from + 64 * (odd ^ 1));
      w[0] = odd ? v.x : u.x, w[1] = odd ? v.y : u.y, w[2] = odd ? v.z : u.z, w[3] = odd ? v.w : u.w;
      w[4] = odd ? u.x : v.x, w[5] = odd ? u.y : v.y, w[6] = odd ? u.z : v.z, w[7] = odd ? u.w : v.w;
    }
  }

  static __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&low)[kW],
                                                  const uint32_t (&high)[kW], const uint32_t (&x)[kValues]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kInt8) {
        ptx::mma<T>(sum, widen<T>(low[j]), widen<T>(high[j]), widen<T>(low[j] >> 8), widen<T>(high[j] >> 8), x[2 * j],
                    x[2 * j + 1]);
      } else {
        ptx::mma<T>(sum, low[2 * j], high[2 * j], low[2 * j + 1], high[2 * j + 1], x[2 * j], x[2 * j + 1]);
      }
    }
  }

  __device__ __forceinline__ int column_bits() const { return p.rows <= 2 ? 1 : p.rows <= 4 ? 2 : 3; }
  __device__ __forceinline__ int columns() const { return 1 << column_bits(); }
  __device__ __forceinline__ float* sum_of(int row, int column) const {
    return s.sums + ((row << column_bits()) + column) * kPitch;
  }

  // kBlocks: blocks of a warp in one part, at most; kAhead: runs in registers before the activations are fetched. The
  // block has rows `rows` of the matrix; `gated`: rows of w1 and of w3, whose runs take turns.
  // fetch(part, x): this warp's blocks of activations; called once if there is one part, else for every pair of runs.
  // finish(row, column, sum, up): by one thread for each result
  template <int kBlocks, int kParts, int kAhead, bool kGated, typename Fetch, typename Finish>
  __device__ __forceinline__ void linear(const StepMatrix& m, const Share& rows, int k, Fetch fetch, Finish finish) {
    static_assert(kParts == 1 || kAhead == 0, "runs ahead are of one part");
    // who needs nothing reads nothing: what it would wait for may be overwritten already
    if (rows.count == 0) return;
    const int blocks = k / kBlock, row_bytes = kInt8 ? k : 2 * k;
    const int runs = kGated ? 2 * ceil_div(rows.count, kRun) : ceil_div(rows.count, kRun);
    const auto run = [&](int i) {
      const int left = rows.count - kRun * (kGated ? i / 2 : i);
      return Run{larger(0, smaller(kRun, left)), row_bytes};
    };
    uint32_t ahead[kAhead ? kAhead : 1][kBlocks][kW], x[kBlocks][kValues];
    const auto load_ahead = [&](int first) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const Run r = run(first + i);
        const Cursor from = wait(r.tiles());
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) fragment(r, from, b, blocks, ahead[i][b]);
        release(from, r.tiles());
      }
    };
    load_ahead(0);
    if (kParts == 1) fetch(0, x);
#pragma unroll 1
    for (int first = 0; first < runs; first += kBatchRuns) {
#pragma unroll
      for (int i = 0; i < kBatchRuns; i += 2) {
        if (first + i >= runs) break;
        const Run low = run(first + i), high = run(first + i + 1);
        const int low_tiles = i < kAhead ? 0 : low.tiles(), high_tiles = i + 1 < kAhead ? 0 : high.tiles();
        const Cursor low_at = wait(low_tiles), high_at = wait(high_tiles);
        float sum[4] = {};
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
          if (kParts > 1) fetch(part, x);
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            uint32_t low_w[kW], high_w[kW];
            if (i >= kAhead) fragment(low, low_at, part * kBlocks + b, blocks, low_w);
            if (i + 1 >= kAhead) fragment(high, high_at, part * kBlocks + b, blocks, high_w);
            multiply(sum, i < kAhead ? ahead[i < kAhead ? i : 0][b] : low_w,
                     i + 1 < kAhead ? ahead[i + 1 < kAhead ? i + 1 : 0][b] : high_w, x[b]);
          }
        }
        release(low_at, low_tiles + high_tiles);
        // sums 0 and 1: row g, columns 2 t and 2 t + 1; 2 and 3: row g + 8
        if (2 * t < columns()) {
          float *upper = sum_of(kRun * i + g, 2 * t) + warp, *lower = sum_of(kRun * (i + 1) + g, 2 * t) + warp;
          upper[0] = sum[0], upper[kPitch] = sum[1];
          lower[0] = sum[2], lower[kPitch] = sum[3];
        }
      }
      sync();
      const int row = threadIdx.x >> column_bits(), column = threadIdx.x & (columns() - 1);
      const int done = kRun * (kGated ? first / 2 : first), batch = kGated ? kBatchRows / 2 : kBatchRows;
      if (row < smaller(batch, rows.count - done) && column < p.rows) {
        const int n = rows.begin + done + row, at_row = kGated ? row / kRun * 2 * kRun + row % kRun : row;
        float sum = sum16(sum_of(at_row, column)), up = kGated ? sum16(sum_of(at_row + kRun, column)) : 0.0f;
        if constexpr (kInt8) {
          sum *= m.scale[n];
          if constexpr (kGated) up *= m.scale[p.hidden + n];
        }
        finish(n, column, sum, up);
      }
      if (first + kBatchRuns >= runs) break;
      sync();
      load_ahead(first + kBatchRuns);
    }
  }
};

}  // namespace flexkernels::cuda::step
