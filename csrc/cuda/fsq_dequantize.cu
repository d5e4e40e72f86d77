// Ids to codes: a warp a tile of rows, as fsq_quantize.cu has it, or a thread a row for what is larger.
#include "fsq.h"

namespace flexkernels::cuda {
namespace {

constexpr int kThreads = 256;

struct Digits {
  const void* ids;  // [n]
  void* codes;      // [n, dims]
  int64_t n;
  uint32_t codebook;
  IdType id_type;
  bool packed;  // codes begin at a multiple of 16 bytes
  // L, and ceil(2^32 / L): floor(id / L) is the high half of the product for ids below 2^24, since L <= 256
  uint32_t level[kFsqFewDims], reciprocal[kFsqFewDims];
  float half[kFsqFewDims], inverse[kFsqFewDims];  // L // 2 and its reciprocal
};

template <typename T, int DIMS>
__global__ void __launch_bounds__(32 * kFsqWarps) fsq_dequantize_kernel(const __grid_constant__ Digits p) {
  using Tile = FsqTile<T, DIMS>;
  constexpr int N = kRowPack<T, DIMS>;
  __shared__ Tile tiles[kFsqWarps];
  Tile& tile = tiles[threadIdx.x / 32];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kFsqWarps + threadIdx.x / 32) * Tile::kRows;
  if (first >= p.n) return;
  const int rows = p.n - first < Tile::kRows ? static_cast<int>(p.n - first) : Tile::kRows;
  uint64_t ids[Tile::kRowsPerLane];
#pragma unroll
  for (int k = 0; k < Tile::kRowsPerLane; ++k) {
    const int r = k * 32 + lane;
    ids[k] = fsq_load_id(p.ids, p.id_type, first + (r < rows ? r : rows - 1));
  }
#pragma unroll
  for (int k = 0; k < Tile::kRowsPerLane; ++k) {
    const int r = k * 32 + lane;
    if (r >= rows) break;
    // a foreign id gives the codes of 0
    uint32_t rest = ids[k] < p.codebook ? static_cast<uint32_t>(ids[k]) : 0;
#pragma unroll
    for (int i = 0; i < DIMS; i += N) {
      float v[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int d = i + j;
        const uint32_t above = __umulhi(rest, p.reciprocal[d]);
        const int level = static_cast<int>(rest - above * p.level[d]);
        v[j] = fsq_quotient(static_cast<float>(level) - p.half[d], p.half[d], p.inverse[d]);
        rest = above;
      }
      store_floats<N>(tile.row(r) + i, v);
    }
  }
  tile.store(static_cast<T*>(p.codes) + first * DIMS, rows, p.packed);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) fsq_dequantize_any_kernel(const __grid_constant__ FsqDequantize p) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.n) return;
  const uint64_t given = fsq_load_id(p.ids, p.id_type, row);
  uint64_t rest = given < static_cast<uint64_t>(p.codebook) ? given : 0;
  T* codes = static_cast<T*>(p.codes) + row * p.dims;
  for (int d = 0; d < p.dims; ++d) {
    const uint32_t level = p.levels[d];
    const uint64_t above = rest >> 32 ? rest / level : static_cast<uint32_t>(rest) / level;
    const int digit = static_cast<int>(rest - above * level);
    from_float(p.table ? p.table[d * (p.width + 1) + digit] : fsq_code(digit, p.levels[d] / 2), codes + d);
    rest = above;
  }
}

}  // namespace

void fsq_dequantize_launch(const FsqDequantize& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  const bool few = p.dims <= kFsqFewDims && p.codebook <= kFsqFloatIds && !p.table;
  Digits q{p.ids, p.codes, p.n, static_cast<uint32_t>(p.codebook), p.id_type, aligned16(p.codes), {}, {}, {}, {}};
  for (int d = 0; few && d < p.dims; ++d) {
    q.level[d] = static_cast<uint32_t>(p.levels[d]);
    q.reciprocal[d] = static_cast<uint32_t>(((uint64_t{1} << 32) + q.level[d] - 1) / q.level[d]);
    q.half[d] = static_cast<float>(p.levels[d] / 2);
    q.inverse[d] = 1.0f / q.half[d];
  }
  with_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (!few)
      return launch({"fsq_dequantize", fsq_blocks(p.n, kThreads), kThreads, stream, 0, 1, true},
                    fsq_dequantize_any_kernel<T>, p);
    with_constant<kFsqFewDims>(p.dims, [&](auto dims) {
      using Tile = FsqTile<T, dims()>;
      launch({"fsq_dequantize", fsq_blocks(p.n, Tile::kRowsPerBlock), 32 * kFsqWarps, stream, 0, 1, true},
             fsq_dequantize_kernel<T, dims()>, q);
    });
  });
}

}  // namespace flexkernels::cuda
