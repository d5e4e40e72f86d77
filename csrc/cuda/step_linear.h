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

// a lane's four quarters of a block of activations, each four channels: the first channel of quarter 0, and how far
// quarter i is from there, constants so that loads of a block have one address
template <bool kInt8>
__device__ __forceinline__ int quarters(int t) {
  return (kInt8 ? 16 : 8) * t;
}
template <bool kInt8>
__device__ __forceinline__ int quarter(int i) {
  return kInt8 ? 4 * i : 32 * (i / 2) + 4 * (i % 2);
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
  static constexpr int kW = kWeights<kInt8>, kBlockBytes = kInt8 ? kBlock : 2 * kBlock;

  const TransformerStep& p;
  const Counted& counted;
  const Shared& s;
  Cursor at;
  int warp, lane, g, t;

  __device__ Lanes(const TransformerStep& p, const Counted& counted, const Shared& s) : p(p), counted(counted), s(s) {
    at.slots = counted.slots;
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
  // the warp has read them; a lane a tile
  __device__ __forceinline__ void release(const Cursor& from, int tiles) {
    __syncwarp();
    if (lane < tiles) ptx::mbarrier_arrive(s.empty + slot(from, lane));
  }

  // row g of a block at `from`, zeros where it is not valid. Rows are whole numbers of 128 (of int8 64) bytes, so
  // neighbouring rows would read the same banks: an odd row reads its halves in the other order
  __device__ __forceinline__ void fragment(const unsigned char* from, bool valid, uint32_t (&w)[kW]) const {
#pragma unroll
    for (int j = 0; j < kW; ++j) w[j] = 0;
    if (!valid) return;
    from += 16 * t;
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

  // of tile `i` of those from `first`
  __device__ __forceinline__ int slot(const Cursor& first, int i) const {
    const int slot = first.slot + i;
    return slot < at.slots ? slot : slot - at.slots;
  }
  __device__ __forceinline__ const unsigned char* tile(const Cursor& first, int i) const {
    return s.ring + (slot(first, i) << kTileBits);
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

  __device__ __forceinline__ int column_bits() const { return counted.column_bits; }
  __device__ __forceinline__ int columns() const { return 1 << column_bits(); }
  __device__ __forceinline__ float* sum_of(int row, int column) const {
    return s.sums + ((row << column_bits()) + column) * kPitch;
  }

  // this warp's parts of the sums of runs i and i + 1. Sums 0 and 1: row g, columns 2 t and 2 t + 1; 2 and 3: row g + 8
  __device__ __forceinline__ void keep_sums(int i, const float (&sum)[4]) const {
    if (2 * t >= columns()) return;
    const int run = (kRun << column_bits()) * kPitch;
    float *upper = sum_of(g, 2 * t) + warp + i * run, *lower = upper + run;
    upper[0] = sum[0], upper[kPitch] = sum[1];
    lower[0] = sum[2], lower[kPitch] = sum[3];
  }

  // runs of the block's rows; `kGated`: of w1 and of w3, which take turns
  template <bool kGated>
  static __device__ __forceinline__ int runs_of(const Share& rows) {
    return (kGated ? 2 : 1) * ceil_div(rows.count, kRun);
  }

  // finish(row, column, sum, up), by one thread for each result of the batch that begins with run `first`
  template <bool kGated, typename Finish>
  __device__ __forceinline__ void finish_batch(const StepMatrix& m, const Share& rows, int first, Finish finish) const {
    const int row = threadIdx.x >> column_bits(), column = threadIdx.x & (columns() - 1);
    const int done = kRun * (kGated ? first / 2 : first), batch = kGated ? kBatchRows / 2 : kBatchRows;
    if (row >= smaller(batch, rows.count - done) || column >= p.rows) return;
    const int n = rows.begin + done + row, at_row = kGated ? row / kRun * 2 * kRun + row % kRun : row;
    float sum = sum16(sum_of(at_row, column)), up = kGated ? sum16(sum_of(at_row + kRun, column)) : 0.0f;
    if constexpr (kInt8) {
      sum *= m.scale[n];
      if constexpr (kGated) up *= m.scale[p.hidden + n];
    }
    finish(n, column, sum, up);
  }

  // A matrix whose runs are a tile each. A batch's tiles are all there before the activations are waited for, so that
  // behind that wait there are loads and products alone. kBlocks: blocks of a warp, at most; kAhead: runs in registers
  // before the activations are fetched. fetch(0, x): this warp's blocks of activations, called once
  template <int kBlocks, int kAhead, bool kGated, typename Fetch, typename Finish>
  __device__ __forceinline__ void linear(const StepMatrix& m, const Share& rows, int k, Fetch fetch, Finish finish) {
    // who needs nothing reads nothing: what it would wait for may be overwritten already
    if (rows.count == 0) return;
    const int blocks = k / kBlock, in_tile = g * (kInt8 ? k : 2 * k) + warp * kBlockBytes, runs = runs_of<kGated>(rows);
    uint32_t ahead[kAhead ? kAhead : 1][kBlocks][kW], x[kBlocks][kValues];
    int first = 0, here = smaller(kBatchRuns, runs);
    Cursor from;
    const auto load = [&](int i, int b, uint32_t (&w)[kW]) {
      const int row = g + kRun * (kGated ? (first + i) / 2 : first + i);
      fragment(tile(from, i) + in_tile + b * kWarps * kBlockBytes, row < rows.count && warp + kWarps * b < blocks, w);
    };
    const auto begin_batch = [&] {
      from = wait(here);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) load(i, b, ahead[i][b]);
      }
    };
    begin_batch();
    fetch(0, x);
#pragma unroll 1
    for (;;) {
#pragma unroll
      for (int i = 0; i < kBatchRuns; i += 2) {
        if (i >= here) break;
        float sum[4] = {};
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          uint32_t low[kW], high[kW];
          if (i >= kAhead) load(i, b, low);
          if (i + 1 >= kAhead) load(i + 1, b, high);
          multiply(sum, i < kAhead ? ahead[i < kAhead ? i : 0][b] : low,
                   i + 1 < kAhead ? ahead[i + 1 < kAhead ? i + 1 : 0][b] : high, x[b]);
        }
        keep_sums(i, sum);
      }
      release(from, here);
      sync();
      finish_batch<kGated>(m, rows, first, finish);
      first += kBatchRuns;
      if (first >= runs) return;
      sync();
      here = smaller(kBatchRuns, runs - first);
      begin_batch();
    }
  }

  // A matrix whose runs are any number of tiles, of which those of a pair are waited for together. kBlocks: blocks of a
  // warp in one part, at most. fetch(part, x): called once if there is one part, else for every pair of runs
  template <int kBlocks, int kParts, bool kGated, typename Fetch, typename Finish>
  __device__ __forceinline__ void linear_of_long_runs(const StepMatrix& m, const Share& rows, int k, Fetch fetch,
                                                      Finish finish) {
    if (rows.count == 0) return;
    const int blocks = k / kBlock, row_bytes = kInt8 ? k : 2 * k, runs = runs_of<kGated>(rows);
    const auto tiles_of = [&](int run) {
      return (rows_of_run<kGated>(rows, run) * row_bytes + kTile - 1) >> kTileBits;
    };
    const auto wait_for_pair = [&](int run) { return wait(tiles_of(run) + tiles_of(run + 1)); };
    uint32_t x[kBlocks][kValues];
    Cursor from = wait_for_pair(0);
    if (kParts == 1) fetch(0, x);
#pragma unroll 1
    for (int first = 0;; first += kBatchRuns) {
#pragma unroll 1
      for (int i = 0; i < kBatchRuns && first + i < runs; i += 2) {
        const int low_rows = rows_of_run<kGated>(rows, first + i), high_rows = rows_of_run<kGated>(rows, first + i + 1);
        const int low_tiles = tiles_of(first + i);
        float sum[4] = {};
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
          if (kParts > 1) fetch(part, x);
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            const int block = warp + kWarps * (part * kBlocks + b), offset = g * row_bytes + block * kBlockBytes;
            const int tiles = offset >> kTileBits, in_tile = offset & (kTile - 1);
            uint32_t low[kW], high[kW];
            fragment(tile(from, tiles) + in_tile, g < low_rows && block < blocks, low);
            fragment(tile(from, low_tiles + tiles) + in_tile, g < high_rows && block < blocks, high);
            multiply(sum, low, high, x[b]);
          }
        }
        release(from, low_tiles + tiles_of(first + i + 1));
        keep_sums(i, sum);
        if (first + i + 2 < runs) from = wait_for_pair(first + i + 2);
      }
      sync();
      finish_batch<kGated>(m, rows, first, finish);
      if (first + kBatchRuns >= runs) return;
      sync();
    }
  }

  // rows of a run, 0 behind the last
  template <bool kGated>
  static __device__ __forceinline__ int rows_of_run(const Share& rows, int run) {
    return larger(0, smaller(kRun, rows.count - kRun * (kGated ? run / 2 : run)));
  }
};

}  // namespace flexkernels::cuda::step
