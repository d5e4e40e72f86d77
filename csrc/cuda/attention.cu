// Flash-attention forward on tensor cores, over the tiles of a layout's plan; bfloat16 and float16, sums in float32:
//   S = scale Q K^T + w,  m' = max(m, rowmax S),  P = 2^(S - m'),  l = l 2^(m - m') + rowsum P,
//   O = O 2^(m - m') + P V,  and at the end out = O / l, lse = ln 2 (m + log2 l), with log2(e) in scale and w.
//
// A block takes kRows rows of a tile, gathered by index, and one head; a warp 16 of the rows, whose Q, S, P and O stay
// in its registers. All warps walk over the keys kStep at a time; K, V and w of the next steps are on their way to
// shared memory meanwhile (cp.async), one barrier a step. A step whose keys all rows see needs no mask; elsewhere a key
// is cut by the row's reach, or with cross-frame switches by frames and ranks. A row's sums depend on its own sequence
// alone.
//
// On paper, head_dim 64: of a step a warp does 64 mma of 4,096 flops and reads K and V once, 16 KiB: 16 flops a byte of
// shared memory, which at 128 bytes a clock is 2,048 flops a clock and SM: all of sm_80's tensor cores (312 TFLOP/s),
// half of sm_90's (474 of 989). Its 1,024 exponentials take half that time, its 3,600 other float32 operations as much
// on sm_80 and a quarter on sm_90; three or four blocks on an SM overlap them. At 60 to 65% of the bound: 190 and 300
// TFLOP/s. Global memory hardly counts: a block reads 256 bytes a key for 64 rows, 64 flops a byte, from L2.
#include "../core/attention.h"

#include "kernels.h"
#include "launch.h"
#include "pack.h"
#include "vectors.h"

namespace flexkernels::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // of queries a block
constexpr int kStep = 64;           // keys
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// below every score, and finite: a row without a key keeps it, and 2^(-inf - kLow) is 0
constexpr float kLow = -3.0e38f;
// of a scale: with 0 every score is 0, but that of a hidden key must stay -inf
constexpr float kLeastScale = 1e-30f;

// D: head_dim of the instance, a row of shared memory; what a head_dim lacks is zero
template <int D>
struct Shared {
  static constexpr int kStages = D == 64 ? 3 : 2;
  static constexpr int kChunks = D / 8;  // of 16 bytes a row

  struct Stage {
    uint16_t k[kStep * D], v[kStep * D];
    float weight[kStep];
  };
  Stage stages[kStages];

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

// 64 rows of head_dim elements from row_of(i) to shared memory, zeros for rows from `count` on and beyond head_dim
template <int D, typename RowOf>
__device__ __forceinline__ void load_rows(uint16_t* to, int count, int head_dim, bool aligned, const RowOf& row_of) {
  constexpr int kChunks = Shared<D>::kChunks, kPass = kThreads / kChunks;
  static_assert(kPass % 8 == 0 && kRows == kStep, "a thread's chunk has one place in every pass");
  const int thread = threadIdx.x, chunk = thread % kChunks, first = thread / kChunks;
  uint16_t* at = to + Shared<D>::place(first, chunk);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kStep; i += kPass) {
      const bool there = first + i < count && 8 * chunk < head_dim;
      ptx::cp_async<16>(at + i * D, row_of(first + i) + 8 * chunk, there);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kStep; i += kPass) {
      const int left = first + i < count ? head_dim - 8 * chunk : 0;
      *reinterpret_cast<uint4*>(at + i * D) = gather(row_of(first + i) + 8 * chunk, left);
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
__device__ __forceinline__ void scores(const uint32_t (&q)[D / 16][4], const uint16_t* k, float (&s)[kStep / 8][4]) {
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
__device__ __forceinline__ void add_values(const float (&s)[kStep / 8][4], const uint16_t* v, float (&o)[D / 8][4]) {
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

// keys that a row does not see get -inf; rows: those of the lane
template <bool kSwitched>
__device__ __forceinline__ void hide(const AttentionForward& p, const int (&rows)[2], int key, int end,
                                     float (&s)[kStep / 8][4]) {
  const int first = threadIdx.x % 4 * 2;
  if constexpr (kSwitched) {
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 8 * j + first + e;
        const bool there = c < end - key;
        const int frame = there ? p.k_frame[key + c] : 0, rank = there ? p.k_rank[key + c] : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = rows[half];
          const bool seen = there && attention_visible<int>(p.mask, p.q_frame[row], p.q_rank[row], frame, rank);
          if (!seen) s[j][2 * half + e] = -INFINITY;
        }
      }
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int seen = p.reach[rows[half]] - key - first;
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + e >= seen) s[j][2 * half + e] = -INFINITY;
        }
      }
    }
  }
}

// the maximum or sum of the four lanes that share rows
template <typename Combine>
__device__ __forceinline__ float over_lanes(float x, const Combine& combine) {
  x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// factor S to P, with l and O brought to the new maximum
template <int D>
__device__ __forceinline__ void softmax(float factor, float (&s)[kStep / 8][4], Rows<D>& rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = s[0][2 * half];
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    top = over_lanes(top, [](float a, float b) { return fmaxf(a, b); });
    const float most = fmaxf(rows.most[half], top * factor), shrink = ptx::exp2_approx(rows.most[half] - most);
    rows.most[half] = most;
    float sum = rows.total[half] * shrink;
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[j][e] = ptx::exp2_approx(fmaf(s[j][e], factor, -most));
        sum += s[j][e];
      }
    }
    rows.total[half] = sum;
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      rows.o[c][2 * half] *= shrink;
      rows.o[c][2 * half + 1] *= shrink;
    }
  }
}

// O / l to out, by way of shared memory [16, D] for whole rows; index_of(i): row i of the warp
template <typename T, int D, typename IndexOf>
__device__ __forceinline__ void write_out(const AttentionForward& p, const Rows<D>& rows, const float (&total)[2],
                                          uint16_t* shared, int count, int head, bool aligned,
                                          const IndexOf& index_of) {
  constexpr int kChunks = Shared<D>::kChunks;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = total[half] == 0 ? 0.0f : 1.0f / total[half];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t pair = pack_pair<T>(rows.o[c][2 * half] * factor, rows.o[c][2 * half + 1] * factor);
      *reinterpret_cast<uint32_t*>(shared + Shared<D>::place(8 * half + g, c) + 2 * t) = pair;
    }
  }
  __syncwarp();
  const int chunk = lane % kChunks;
#pragma unroll 1
  for (int i = lane / kChunks; i < 16; i += 32 / kChunks) {
    if (i >= count || 8 * chunk >= p.head_dim) continue;
    const uint16_t* from = shared + Shared<D>::place(i, chunk);
    uint16_t* to =
        static_cast<uint16_t*>(p.out) + (static_cast<int64_t>(index_of(i)) * p.heads + head) * p.head_dim + 8 * chunk;
    if (aligned) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && 8 * chunk + e < p.head_dim; ++e) to[e] = from[e];
    }
  }
}

// grid: heads of a tile are neighbours, later tiles, whose rows see more keys, go first. parts: blocks of a tile
template <typename T, int D, bool kSwitched>
__global__ void __launch_bounds__(kThreads, D == 64 ? (kSwitched ? 3 : 4) : 2)
    attention_kernel(const __grid_constant__ AttentionForward p, const int parts, const bool aligned) {
  constexpr int kStages = Shared<D>::kStages;
  Shared<D>& shared = *ptx::dynamic_shared<Shared<D>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned program = gridDim.x - 1 - blockIdx.x;
  const int head = static_cast<int>(program % p.heads), part = static_cast<int>(program / p.heads);
  const int64_t tile = part / parts;
  const int count = p.rows_of(tile) - part % parts * kRows;
  if (count <= 0) return;
  const int32_t* indices = p.rows + tile * p.tile_rows + part % parts * kRows;
  // rows that the tile lacks are its last one again
  const auto index_of = [&](int i) { return indices[i < count ? i : count - 1]; };
  const int kv_head = head / (p.heads / p.kv_heads);
  const uint16_t* q = static_cast<const uint16_t*>(p.q) + head * p.q_head;
  const uint16_t* k = static_cast<const uint16_t*>(p.k) + kv_head * p.k_head;
  const uint16_t* v = static_cast<const uint16_t*>(p.v) + kv_head * p.v_head;

  Walk<kSwitched> ahead(p, tile), now = ahead;
  const auto load_step = [&](int stage) {
    if (ahead.more()) {
      auto& to = shared.stages[stage];
      const int key = ahead.key, there = ahead.end - key;
      load_rows<D>(to.k, there, p.head_dim, aligned,
                   [&](int i) { return k + static_cast<int64_t>(key + i) * p.k_row; });
      load_rows<D>(to.v, there, p.head_dim, aligned,
                   [&](int i) { return v + static_cast<int64_t>(key + i) * p.v_row; });
      if (p.key_log_weight && threadIdx.x < kStep) {
        const int i = threadIdx.x;
        ptx::cp_async<4>(to.weight + i, p.key_log_weight + key + i, i < there);
      }
      ahead.next(p);
    }
    // also an empty group counts
    ptx::cp_async_commit();
  };

  // Q comes through the keys of the stage that is filled last
  uint16_t* s_q = shared.stages[kStages - 1].k;
  load_rows<D>(s_q, kRows, p.head_dim, aligned, [&](int i) { return q + index_of(i) * p.q_row; });
  for (int stage = 0; stage < kStages - 1; ++stage) load_step(stage);
  ptx::cp_async_wait<kStages - 2>();
  __syncthreads();

  Rows<D> rows = {};
  rows.most[0] = rows.most[1] = kLow;
  const bool idle = 16 * warp >= count;
  // scale >= 0 commutes with max: its sign goes to Q
  const uint32_t sign = p.softmax_scale < 0 ? 0x80008000u : 0;
  const float scale = fmaxf(fabsf(p.softmax_scale) * kLog2E, kLeastScale);
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    ptx::ldmatrix(rows.q[c], s_q + 16 * warp * D + (Shared<D>::place(lane % 16, lane / 16) ^ 16 * c));
#pragma unroll
    for (int e = 0; e < 4; ++e) rows.q[c][e] ^= sign;
  }
  const int own[2] = {index_of(16 * warp + lane / 4), index_of(16 * warp + lane / 4 + 8)};

#pragma unroll 1
  for (int stage = 0; now.more(); stage = stage + 1 == kStages ? 0 : stage + 1) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    load_step(stage == 0 ? kStages - 1 : stage - 1);
    if (!idle) {
      const auto& from = shared.stages[stage];
      float s[kStep / 8][4], factor = scale;
      scores<T, D>(rows.q, from.k, s);
      if (p.key_log_weight) {
#pragma unroll
        for (int j = 0; j < kStep / 8; ++j) {
          const float2 w = *reinterpret_cast<const float2*>(from.weight + 8 * j + lane % 4 * 2);
#pragma unroll
          for (int e = 0; e < 4; ++e) s[j][e] = fmaf(s[j][e], scale, kLog2E * (e % 2 ? w.y : w.x));
        }
        factor = 1;
      }
      if (!now.whole()) hide<kSwitched>(p, own, now.key, now.end, s);
      softmax<D>(factor, s, rows);
      add_values<T, D>(s, from.v, rows.o);
    }
    now.next(p);
  }
  // all groups are empty by now; other warps may still read what is overwritten
  __syncthreads();
  if (idle) return;
  float total[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = over_lanes(rows.total[half], [](float a, float b) { return a + b; });
    const bool nothing = total[half] == 0;
    const float lse = nothing ? -INFINITY : rows.most[half] * kLn2 + logf(total[half]);
    if (lane % 4 == 0 && 16 * warp + lane / 4 + 8 * half < count) p.lse[head * p.total_q + own[half]] = lse;
  }
  write_out<T, D>(p, rows, total, shared.stages[0].k + 16 * warp * D, count - 16 * warp, head, aligned,
                  [&](int i) { return index_of(16 * warp + i); });
}

// rows of no sequence: out 0, lse -inf
__global__ void attention_rest_kernel(const __grid_constant__ AttentionForward p) {
  const int64_t rest = p.total_q - p.used_q, thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x, width = p.heads * p.head_dim;
  uint16_t* out = static_cast<uint16_t*>(p.out) + p.used_q * width;
  for (int64_t i = thread; i < rest * width; i += threads) out[i] = 0;
  for (int64_t i = thread; i < rest * p.heads; i += threads)
    p.lse[i / rest * p.total_q + p.used_q + i % rest] = -INFINITY;
}

bool aligned(const AttentionForward& p) {
  const int64_t strides[] = {p.q_row, p.q_head, p.k_row, p.k_head, p.v_row, p.v_head, p.head_dim};
  bool fit = aligned16(p.q) && aligned16(p.k) && aligned16(p.v) && aligned16(p.out);
  for (const int64_t stride : strides) fit = fit && stride % 8 == 0;
  return fit;
}

template <typename T, int D>
void queue_tiles(const AttentionForward& p, cudaStream_t stream) {
  const int parts = (p.tile_rows + kRows - 1) / kRows;
  const unsigned grid = static_cast<unsigned>(p.tile_count * parts * p.heads);
  const Launch at{"attention", dim3(grid), dim3(kThreads), stream, sizeof(Shared<D>)};
  launch(at, p.reach ? attention_kernel<T, D, false> : attention_kernel<T, D, true>, p, parts, aligned(p));
}

template <typename T>
void queue(const AttentionForward& p, cudaStream_t stream) {
  p.head_dim <= 64 ? queue_tiles<T, 64>(p, stream) : queue_tiles<T, 128>(p, stream);
}

}  // namespace

void attention_launch(const AttentionForward& p, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  if (p.heads == 0) return;
  if (p.total_q > p.used_q) {
    const int64_t blocks = ((p.total_q - p.used_q) * p.heads * p.head_dim + kThreads - 1) / kThreads;
    const unsigned grid = static_cast<unsigned>(blocks < 1024 ? blocks : 1024);
    launch({"attention", dim3(grid), dim3(kThreads), stream}, attention_rest_kernel, p);
  }
  if (p.tile_count == 0) return;
  p.dtype == Dtype::bf16 ? queue<bf16>(p, stream) : queue<f16>(p, stream);
}

}  // namespace flexkernels::cuda
