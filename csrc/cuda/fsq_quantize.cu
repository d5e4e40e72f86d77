// FSQ of up to 8 dimensions of up to 16 levels: a warp a tile of rows, a lane a row at a time. The thresholds are
// kernel arguments, so that each is a constant operand of its compare: a level costs a compare and a sum for each.
#include "fsq.h"

namespace flexkernels::cuda {
namespace {

// a level is at most this, but for the larger sets
constexpr int kFewThresholds = 7, kMostThresholds = 15;
// an id is the sum over these, and that over the rest by their product: a float32 holds either
constexpr int kLowDims = 6;

struct FewLevels {
  const void* z;  // [n, dims]
  void* codes;    // [n, dims] or null
  void* ids;      // [n] or null
  int64_t n;
  uint32_t low_codebook;
  IdType id_type;
  bool packed;                                     // z and codes begin at a multiple of 16 bytes
  float thresholds[kFsqFewDims][kMostThresholds];  // ascending, +inf behind the last
  float half[kFsqFewDims], inverse[kFsqFewDims];   // L // 2 and its reciprocal
  float basis[kFsqFewDims];                        // 1, L0, L0*L1, ..., anew from kLowDims on
};

template <typename T, int DIMS, int COUNT>
__global__ void __launch_bounds__(32 * kFsqWarps) fsq_quantize_kernel(const __grid_constant__ FewLevels p) {
  using Tile = FsqTile<T, DIMS>;
  constexpr int N = kRowPack<T, DIMS>;
  __shared__ Tile tiles[kFsqWarps];
  Tile& tile = tiles[threadIdx.x / 32];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kFsqWarps + threadIdx.x / 32) * Tile::kRows;
  if (first >= p.n) return;
  const int rows = p.n - first < Tile::kRows ? static_cast<int>(p.n - first) : Tile::kRows;
  tile.load(static_cast<const T*>(p.z) + first * DIMS, rows, p.packed);
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < rows; r += 32) {
    float low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < DIMS; i += N) {
      float v[N];
      load_floats<N>(tile.row(r) + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int d = i + j;
        float level = ptx::greater(v[j], p.thresholds[d][0]);
#pragma unroll
        for (int k = 1; k < COUNT; ++k) level += ptx::greater(v[j], p.thresholds[d][k]);
        (d < kLowDims ? low : high) = fmaf(level, p.basis[d], d < kLowDims ? low : high);
        v[j] = fsq_quotient(level - p.half[d], p.half[d], p.inverse[d]);
      }
      store_floats<N>(tile.row(r) + i, v);
    }
    uint64_t id = static_cast<uint32_t>(low);
    if constexpr (DIMS > kLowDims) id += static_cast<uint64_t>(p.low_codebook) * static_cast<uint32_t>(high);
    if (p.ids) fsq_store_id(p.ids, p.id_type, first + r, static_cast<int64_t>(id));
  }
  if (p.codes) tile.store(static_cast<T*>(p.codes) + first * DIMS, rows, p.packed);
}

FewLevels few_levels(const FsqQuantize& p) {
  FewLevels q{};
  q.z = p.z;
  q.codes = p.codes;
  q.ids = p.ids;
  q.n = p.n;
  q.id_type = p.id_type;
  q.packed = aligned16(p.z) && aligned16(p.codes);
  int64_t basis = 1;
  for (int d = 0; d < p.dims; ++d) {
    if (d == kLowDims) {
      q.low_codebook = static_cast<uint32_t>(basis);
      basis = 1;
    }
    q.basis[d] = static_cast<float>(basis);
    basis *= p.levels[d];
    q.half[d] = static_cast<float>(p.levels[d] / 2);
    q.inverse[d] = 1.0f / q.half[d];
    for (int k = 0; k < kMostThresholds; ++k) {
      q.thresholds[d][k] = k < p.width ? p.host_thresholds[d * p.width + k] : INFINITY;
    }
  }
  return q;
}

}  // namespace

void fsq_quantize_launch(const FsqQuantize& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  if (p.dims > kFsqFewDims || p.width > kMostThresholds || p.table) return fsq_quantize_any_launch(p, queue);
  const FewLevels q = few_levels(p);
  with_float(p.dtype, [&](auto element) {
    with_constant<kFsqFewDims>(p.dims, [&](auto dims) {
      using T = decltype(element);
      using Tile = FsqTile<T, dims()>;
      launch({"fsq_quantize", fsq_blocks(p.n, Tile::kRowsPerBlock), 32 * kFsqWarps, stream, 0, 1, true},
             p.width <= kFewThresholds ? fsq_quantize_kernel<T, dims(), kFewThresholds>
                                       : fsq_quantize_kernel<T, dims(), kMostThresholds>,
             q);
    });
  });
}

}  // namespace flexkernels::cuda
