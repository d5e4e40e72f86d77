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
// half of sm_90's (474 of 989). Four warps, one a scheduler, take 512 clocks for it; each issues about 440 instructions
// meanwhile and its 1,024 exponentials take 256 clocks, so that the three or four blocks of an SM hide one another's
// waits only in part: 60 to 65% of the bound, 190 and 300 TFLOP/s. Global memory hardly counts: a block reads 256 bytes
// a key for 64 rows, 64 flops a byte, mostly from L2.
#include "attention.h"

#include "kernels.h"
#include "launch.h"

namespace flexkernels::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// below every score, and finite: a row without a key keeps it, and 2^(-inf - kLow) is 0
constexpr float kLow = -3.0e38f;
// of a scale: with 0 every score is 0, but that of a hidden key must stay -inf
constexpr float kLeastScale = 1e-30f;

// keys that a row does not see get -inf; of: of the warp's rows their reach, or with switches their indices
template <bool kSwitched>
__device__ __forceinline__ void hide(const AttentionForward& p, const int* of, int key, int end,
                                     float (&s)[kStep / 8][4]) {
  const int first = threadIdx.x % 4 * 2, g = threadIdx.x % 32 / 4;
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
          const int row = of[g + 8 * half];
          const bool seen =
              there && row >= 0 && attention_visible<int>(p.mask, p.q_frame[row], p.q_rank[row], frame, rank);
          if (!seen) s[j][2 * half + e] = -INFINITY;
        }
      }
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int seen = of[g + 8 * half] - key - first;
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

// O / l to out, by way of shared memory [16, D] for whole rows; indices: the warp's rows
template <typename T, int D>
__device__ __forceinline__ void write_out(const AttentionForward& p, const Rows<D>& rows, const float (&total)[2],
                                          uint16_t* shared, const int* indices, int head, bool aligned) {
  constexpr int kChunks = D / 8;
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
    if (indices[i] < 0 || 8 * chunk >= p.head_dim) continue;
    const uint16_t* from = shared + Shared<D>::place(i, chunk);
    uint16_t* to =
        static_cast<uint16_t*>(p.out) + (static_cast<int64_t>(indices[i]) * p.heads + head) * p.head_dim + 8 * chunk;
    if (aligned) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && 8 * chunk + e < p.head_dim; ++e) to[e] = from[e];
    }
  }
}

// blocks that share a multiprocessor; four at head_dim 64 do not fit sm_80's shared memory, and spill except on sm_90
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kMostBlocks = 4;
#else
constexpr int kMostBlocks = 3;
#endif
template <int D, bool kSwitched>
constexpr int kBlocks = D == 128    ? 2
                        : kSwitched ? 3
                                    : kMostBlocks;

// grid: heads of a tile are neighbours, later tiles, whose rows see more keys, go first. scale: at least kLeastScale;
// parts: blocks of a tile
template <typename T, int D, bool kSwitched>
__global__ void __launch_bounds__(kThreads, kBlocks<D, kSwitched>)
    attention_kernel(const __grid_constant__ AttentionForward p, const float scale, const int parts,
                     const bool aligned) {
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
  const Share<D> own;
  const uint16_t* q = static_cast<const uint16_t*>(p.q) + head * p.q_head + 8 * own.chunk;
  const uint16_t* k = static_cast<const uint16_t*>(p.k) + kv_head * p.k_head + own.first * p.k_row + 8 * own.chunk;
  const uint16_t* v = static_cast<const uint16_t*>(p.v) + kv_head * p.v_head + own.first * p.v_row + 8 * own.chunk;

  Walk<kSwitched> ahead(p, tile), now = ahead;
  const auto load_step = [&](int stage) {
    if (ahead.more()) {
      auto& to = shared.stages[stage];
      const int64_t key = ahead.key;
      const int there = ahead.end - ahead.key;
      load_rows<D>(to.k, there, p.head_dim, aligned,
                   [from = k + key * p.k_row, &p](int i) { return from + i * p.k_row; });
      load_rows<D>(to.v, there, p.head_dim, aligned,
                   [from = v + key * p.v_row, &p](int i) { return from + i * p.v_row; });
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
  load_rows<D>(s_q, kRows, p.head_dim, aligned, [&](int i) { return q + index_of(own.first + i) * p.q_row; });
  for (int stage = 0; stage < kStages - 1; ++stage) load_step(stage);
  if (threadIdx.x < kRows) {
    const int i = threadIdx.x, row = i < count ? indices[i] : -1;
    shared.rows[i] = row;
    if constexpr (!kSwitched) shared.reach[i] = row < 0 ? 0 : p.reach[row];
  }
  ptx::cp_async_wait<kStages - 2>();
  __syncthreads();

  Rows<D> rows = {};
  rows.most[0] = rows.most[1] = kLow;
  const bool idle = 16 * warp >= count;
  // scale >= 0 commutes with max: its sign goes to Q
  const uint32_t sign = p.softmax_scale < 0 ? 0x80008000u : 0;
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    ptx::ldmatrix(rows.q[c], s_q + 16 * warp * D + (Shared<D>::place(lane % 16, lane / 16) ^ 16 * c));
#pragma unroll
    for (int e = 0; e < 4; ++e) rows.q[c][e] ^= sign;
  }

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
      if (!now.whole()) hide<kSwitched>(p, (kSwitched ? shared.rows : shared.reach) + 16 * warp, now.key, now.end, s);
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
    const int row = shared.rows[16 * warp + lane / 4 + 8 * half];
    if (lane % 4 == 0 && row >= 0) p.lse[head * p.total_q + row] = lse;
  }
  write_out<T, D>(p, rows, total, shared.stages[0].k + 16 * warp * D, shared.rows + 16 * warp, head, aligned);
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
  const float scale = fmaxf(fabsf(p.softmax_scale) * kLog2E, kLeastScale);
  const Launch at{"attention", dim3(grid), dim3(kThreads), stream, sizeof(Shared<D>)};
  launch(at, p.reach ? attention_kernel<T, D, false> : attention_kernel<T, D, true>, p, scale, parts, aligned(p));
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
