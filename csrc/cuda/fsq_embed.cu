// Codes of ids through a linear layer, with tables: a thread owns a pack of columns, whose weights it keeps in
// registers, and walks groups of rows. A group's codes are in one of two buffers, so one barrier a group is enough:
// who writes a buffer has passed the barrier that all came to after reading it.
#include "../core/fsq_linear.h"

#include "fsq.h"

namespace flexkernels::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kMaxThreads = 288;
// threads on a multiprocessor for which the blocks of a launch suffice
constexpr int kResident = 2 * kMaxThreads;

// what is added to the codes' sum, or stands in its place; null: nothing
template <typename T>
__device__ const T* source_of(const FsqEmbed& p, int64_t row, bool* replaced) {
  const int64_t token = p.token_index ? p.token_index[row] : -1;
  *replaced = token >= 0;
  if (token >= 0) return static_cast<const T*>(p.tokens) + token * p.width;
  if (!p.positions) return nullptr;
  const int64_t position = p.position_index ? p.position_index[row] : row;
  return static_cast<const T*>(p.positions) + position * p.width;
}

// a foreign id gives the codes of 0
__device__ float code_of(const FsqEmbed& p, int64_t row, int d) {
  const uint64_t given = fsq_load_id(p.ids, p.id_type, row), id = given < static_cast<uint64_t>(p.codebook) ? given : 0;
  const uint32_t level = p.levels[d];
  const uint64_t basis = static_cast<uint64_t>(p.basis[d]);
  const uint32_t digit = p.codebook >> 32 ? static_cast<uint32_t>(id / basis % level)
                                          : static_cast<uint32_t>(id) / static_cast<uint32_t>(basis) % level;
  return fsq_code(static_cast<int>(digit), p.levels[d] / 2);
}

template <int N, typename T>
__device__ __forceinline__ void load_columns(const T* p, bool ok, float (&v)[N]) {
  if constexpr (N == kPack<T>) {
    unpack<T>(ptx::load_once(p, ok), v);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = 0;
    if (ok) load_floats<N>(p, v);
  }
}

template <int N, typename T>
__device__ __forceinline__ void store_columns(T* p, const float (&v)[N]) {
  if constexpr (N == kPack<T>) {
    __stcs(reinterpret_cast<uint4*>(p), pack<T>(v));
  } else {
    store_floats<N>(p, v);
  }
}

// N columns a thread: a pack, four where its weights would not find room in registers, one where rows are not whole
// packs; DIMS: at least the number of dimensions
template <typename T, int N, int DIMS>
__global__ void __launch_bounds__(kMaxThreads, 1) fsq_embed_kernel(const __grid_constant__ FsqEmbed p) {
  __shared__ float codes[2][kRows][DIMS];
  __shared__ const T* sources[2][kRows];
  __shared__ bool replaced[2][kRows];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  const bool inside = column < p.width;
  float weight[DIMS][N], bias[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const T* from = static_cast<const T*>(p.weight) + (column + j) * p.dims;
#pragma unroll
    for (int d = 0; d < DIMS; ++d) weight[d][j] = inside && d < p.dims ? to_float(from[d]) : 0.0f;
  }
  load_columns<N>(static_cast<const T*>(p.bias) + column, inside && p.bias, bias);
  int buffer = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.n;
       first += static_cast<int64_t>(gridDim.x) * kRows, buffer ^= 1) {
    const int count = p.n - first < kRows ? static_cast<int>(p.n - first) : kRows;
    for (int i = threadIdx.x; i < count * DIMS; i += blockDim.x) {
      const int r = i / DIMS, d = i % DIMS;
      codes[buffer][r][d] = d < p.dims ? code_of(p, first + r, d) : 0.0f;
    }
    if (threadIdx.x < count) {
      sources[buffer][threadIdx.x] = source_of<T>(p, first + threadIdx.x, &replaced[buffer][threadIdx.x]);
    }
    __syncthreads();
    if (!inside) continue;
    T* out = static_cast<T*>(p.out) + first * p.width + column;
#pragma unroll 4
    for (int r = 0; r < count; ++r) {
      const T* from = sources[buffer][r];
      const bool instead = replaced[buffer][r];
      float source[N], sum[N];
      load_columns<N>(from + column, from != nullptr, source);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = bias[j];
#pragma unroll
      for (int d = 0; d < DIMS; ++d) {
        const float code = codes[buffer][r][d];
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = fmaf(code, weight[d][j], sum[j]);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = instead ? source[j] : sum[j] + source[j];
      store_columns<N>(out + r * p.width, sum);
    }
  }
}

template <typename T, int N, int DIMS>
void embed(const FsqEmbed& p, cudaStream_t stream) {
  const int64_t packs = (p.width + N - 1) / N, columns = (packs + kMaxThreads - 1) / kMaxThreads;
  const int threads = static_cast<int>(((packs + columns - 1) / columns + 31) / 32 * 32);
  const int64_t groups = (p.n + kRows - 1) / kRows;
  int64_t blocks = static_cast<int64_t>(multiprocessors("fsq_embed")) * (kResident / threads) / columns;
  if (blocks < 1) blocks = 1;
  const dim3 grid(static_cast<unsigned>(groups < blocks ? groups : blocks), static_cast<unsigned>(columns));
  launch({"fsq_embed", grid, static_cast<unsigned>(threads), stream, 0, 1, true}, fsq_embed_kernel<T, N, DIMS>, p);
}

template <typename T>
void embed_packs(const FsqEmbed& p, cudaStream_t stream) {
  bool packed = p.width % kPack<T> == 0;
  for (const void* data : {p.bias, p.positions, p.tokens, static_cast<const void*>(p.out)}) packed &= aligned16(data);
  if (!packed) return embed<T, 1, kFsqMaxDims>(p, stream);
  if (p.dims <= 4) return embed<T, kPack<T>, 4>(p, stream);
  if (p.dims <= 6) return embed<T, kPack<T>, 6>(p, stream);
  if (p.dims <= 8) return embed<T, kPack<T>, 8>(p, stream);
  embed<T, 4, kFsqMaxDims>(p, stream);
}

}  // namespace

void fsq_embed_launch(const FsqEmbed& p, void* queue) {
  with_float(p.dtype, [&](auto element) { embed_packs<decltype(element)>(p, static_cast<cudaStream_t>(queue)); });
}

}  // namespace flexkernels::cuda
