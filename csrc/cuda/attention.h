// The parts of the attention kernel that know where things lie: tiles in shared memory, the keys of a tile, and the two
// products.
#pragma once

#include "../core/attention.h"
#include "pack.h"
#include "vectors.h"

namespace flexkernels::cuda {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // of queries a block
constexpr int kStep = 64;           // keys

// D: head_dim of the instance, a row of shared memory; what a head_dim lacks is zero
template <int D>
struct Shared {
  static constexpr int kStages = D == 64 ? 3 : 2;

  struct Stage {
    uint16_t k[kStep * D], v[kStep * D];
    float weight[kStep];
  };
  Stage stages[kStages];
  int rows[kRows], reach[kRows];  // of the block, -1 for rows that the tile lacks; reach without switches

  // Where chunk c of a row is: c ^ row % 8, so that both the 8 chunks of a row that lanes write and one chunk of 8 rows
  // that ldmatrix reads lie in all 32 banks.
  static __device__ __forceinline__ int place(int row, int chunk) { return row * D + (chunk ^ row % 8) * 8; }
};

// The keys of a tile by steps [key, min(key + kStep, end)).
template <bool kSwitched>
class Walk {
 public:
  int key, end;

  __device__ __forceinline__ Walk(const AttentionForward& p, int64_t tile) {
    if constexpr (kSwitched) {
      run_ = p.ptr[tile];
      last_ = p.ptr[tile + 1];
      key = end = full_ = 0;
      open_run(p);
    } else {
      key = p.tile(tile)[4];
      full_ = p.tile(tile)[5];
      end = p.tile(tile)[6];
    }
  }

  __device__ __forceinline__ bool more() const { return key < end; }
  // whether every row sees all kStep keys
  __device__ __forceinline__ bool whole() const { return full_ - key >= kStep; }

  __device__ __forceinline__ void next(const AttentionForward& p) {
    key = end - key <= kStep ? end : key + kStep;
    if constexpr (kSwitched) open_run(p);
  }

 private:
  __device__ __forceinline__ void open_run(const AttentionForward& p) {
    for (; key >= end && run_ < last_; ++run_) {
      const int32_t* run = p.runs + 3 * static_cast<int64_t>(run_);
      key = run[0];
      end = run[1];
      full_ = run[2] ? end : key;
    }
  }

  int full_;  // keys before it are seen by every row
  int run_, last_;
};

// How the threads of a block share rows: chunk `chunk` of the rows first, first + kPass, ...
template <int D>
struct Share {
  static constexpr int kChunks = D / 8, kPass = kThreads / kChunks;
  const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
};

// 64 rows to shared memory, zeros for rows from `count` on and beyond head_dim; from(i): this thread's chunk of row
// first + i
template <int D, typename From>
static __device__ __forceinline__ void load_rows(uint16_t* to, int count, int head_dim, bool aligned,
                                                 const From& from) {
  constexpr int kPass = Share<D>::kPass;
  static_assert(kPass % 8 == 0 && kRows == kStep, "a thread's chunk has one place in every pass");
  const Share<D> own;
  uint16_t* at = to + Shared<D>::place(own.first, own.chunk);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kStep; i += kPass) {
      ptx::cp_async<16>(at + i * D, from(i), own.first + i < count && 8 * own.chunk < head_dim);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kStep; i += kPass) {
      const int left = own.first + i < count ? head_dim - 8 * own.chunk : 0;
      *reinterpret_cast<uint4*>(at + i * D) = gather(from(i), left);
    }
  }
}

// What a warp keeps of its 16 rows: lane (g, t) = (lane / 4, lane % 4) has rows g and g + 8, columns 8 j + 2 t + {0, 1}
template <int D>
struct Rows {
  uint32_t q[D / 16][4];
  float o[D / 8][4];
  float most[2], total[2];  // m, and this lane's part of l
};

// S [16, kStep] = Q K^T
template <typename T, int D>
static __device__ __forceinline__ void scores(const uint32_t (&q)[D / 16][4], const uint16_t* k,
                                              float (&s)[kStep / 8][4]) {
  const int lane = threadIdx.x % 32;
  // matrices: keys 0 to 7 and 8 to 15 of 16, each with two chunks
  const int row = lane / 16 * 8 + lane % 8, at = Shared<D>::place(row, lane / 8 % 2);
#pragma unroll
  for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = 0;
  }
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
#pragma unroll
    for (int j = 0; j < kStep / 16; ++j) {
      uint32_t b[4];
      ptx::ldmatrix(b, k + 16 * j * D + (at ^ 16 * c));
      ptx::mma<T>(s[2 * j], q[c][0], q[c][1], q[c][2], q[c][3], b[0], b[1]);
      ptx::mma<T>(s[2 * j + 1], q[c][0], q[c][1], q[c][2], q[c][3], b[2], b[3]);
    }
  }
}

// O += P V, P [16, kStep] in the registers of S
template <typename T, int D>
static __device__ __forceinline__ void add_values(const float (&s)[kStep / 8][4], const uint16_t* v,
                                                  float (&o)[D / 8][4]) {
  const int lane = threadIdx.x % 32;
  const int at = Shared<D>::place(lane % 16, lane / 16);
#pragma unroll
  for (int i = 0; i < kStep / 16; ++i) {
    const uint32_t a0 = pack_pair<T>(s[2 * i][0], s[2 * i][1]), a1 = pack_pair<T>(s[2 * i][2], s[2 * i][3]);
    const uint32_t a2 = pack_pair<T>(s[2 * i + 1][0], s[2 * i + 1][1]);
    const uint32_t a3 = pack_pair<T>(s[2 * i + 1][2], s[2 * i + 1][3]);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint32_t b[4];
      ptx::ldmatrix_trans(b, v + 16 * i * D + (at ^ 16 * c));
      ptx::mma<T>(o[2 * c], a0, a1, a2, a3, b[0], b[1]);
      ptx::mma<T>(o[2 * c + 1], a0, a1, a2, a3, b[2], b[3]);
    }
  }
}

}  // namespace flexkernels::cuda
