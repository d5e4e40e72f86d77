// Codes of ids through a linear layer, with tables: a thread owns a pack of columns, whose weights it keeps in
// registers, and walks groups of rows. The tables' rows of a group are all under way before the first of them is used,
// and under them the codes of the next group are made. Codes are in one of two buffers, so one barrier a group is
// enough: who writes a buffer has passed the barrier that all came to after reading it.
#include "../core/fsq_linear.h"

#include "fsq.h"

namespace flexkernels::cuda {
namespace {

// rows of a group: each is up to four registers a thread until it is used, next to those of the weights
template <int N, int DIMS>
constexpr int kRows = N > 4 || DIMS > 8 ? 4 : 8;
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

// N elements as they lie in memory, zeros where !ok
template <typename T, int N>
using Columns = std::conditional_t<N == kPack<T>, uint4, Pack<T, N>>;

template <typename T, int N>
__device__ __forceinline__ Columns<T, N> load_columns(const T* p, bool ok) {
  if constexpr (N == kPack<T>) {
    return ptx::load_constant(p, ok);
  } else {
    return ok ? *reinterpret_cast<const Pack<T, N>*>(p) : Pack<T, N>{};
  }
}

template <typename T, int N>
__device__ __forceinline__ void to_floats(const Columns<T, N>& columns, float (&v)[N]) {
  if constexpr (N == kPack<T>) {
    unpack<T>(columns, v);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = to_float(columns.v[j]);
  }
}

// of N columns from p [N, dims] on; a pack of columns is `dims` packs, which are loaded whole
template <typename T, int N, int DIMS>
__device__ __forceinline__ void load_weights(const T* p, int dims, bool ok, float (&weight)[DIMS][N]) {
  if constexpr (N == kPack<T>) {
    if (dims == DIMS) {
#pragma unroll
      for (int i = 0; i < DIMS; ++i) {
        float v[N];
        unpack<T>(ptx::load_constant(p + i * N, ok), v);
#pragma unroll
        for (int k = 0; k < N; ++k) weight[(i * N + k) % DIMS][(i * N + k) / DIMS] = v[k];
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int d = 0; d < DIMS; ++d) weight[d][j] = ok && d < dims ? to_float(p[j * dims + d]) : 0.0f;
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

// of a group of rows
template <typename T, int ROWS, int DIMS>
struct Group {
  float codes[ROWS][DIMS];
  const T* sources[ROWS];
  bool replaced[ROWS];

  // rows from `first` on; rows that do not exist get zeros and no source
  __device__ __forceinline__ void prepare(const FsqEmbed& p, int64_t first) {
    for (int i = threadIdx.x; i < ROWS * DIMS; i += blockDim.x) {
      const int r = i / DIMS, d = i % DIMS;
      codes[r][d] = d < p.dims && first + r < p.n ? code_of(p, first + r, d) : 0.0f;
    }
    // the last threads, whose warp has no codes to make where there are several
    const int r = blockDim.x - 1 - threadIdx.x;
    if (r >= ROWS) return;
    replaced[r] = false;
    sources[r] = first + r < p.n ? source_of<T>(p, first + r, &replaced[r]) : nullptr;
  }
};

// N columns a thread: a pack, four where its weights would not find room in registers, one where rows are not whole
// packs; DIMS: at least the number of dimensions
template <typename T, int N, int DIMS>
__global__ void __launch_bounds__(kMaxThreads, 1) fsq_embed_kernel(const __grid_constant__ FsqEmbed p) {
  constexpr int R = kRows<N, DIMS>;
  __shared__ Group<T, R, DIMS> groups[2];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  int64_t first = static_cast<int64_t>(blockIdx.x) * R;
  groups[0].prepare(p, first);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  const bool inside = column < p.width;
  float weight[DIMS][N], bias[N];
  load_weights<T, N, DIMS>(static_cast<const T*>(p.weight) + column * p.dims, p.dims, inside, weight);
  to_floats<T, N>(load_columns<T, N>(static_cast<const T*>(p.bias) + column, inside && p.bias), bias);
  int buffer = 0;
  for (; first < p.n; buffer ^= 1) {
    __syncthreads();
    const Group<T, R, DIMS>& group = groups[buffer];
    Columns<T, N> tables[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T* from = group.sources[r];
      tables[r] = load_columns<T, N>(from + column, inside && from);
    }
    const int64_t next = first + static_cast<int64_t>(gridDim.x) * R;
    if (next < p.n) groups[buffer ^ 1].prepare(p, next);
    T* out = static_cast<T*>(p.out) + first * p.width + column;
    const int64_t rows = inside ? p.n - first : 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
      float table[N], sum[N];
      to_floats<T, N>(tables[r], table);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = bias[j];
#pragma unroll
      for (int d = 0; d < DIMS; ++d) {
        const float code = group.codes[r][d];
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = fmaf(code, weight[d][j], sum[j]);
      }
      const bool instead = group.replaced[r];
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = instead ? table[j] : sum[j] + table[j];
      store_columns<N>(out + r * p.width, sum);
    }
    first = next;
  }
}

template <typename T, int N, int DIMS>
void embed(const FsqEmbed& p, cudaStream_t stream) {
  const int64_t packs = (p.width + N - 1) / N, columns = (packs + kMaxThreads - 1) / kMaxThreads;
  const int threads = static_cast<int>(((packs + columns - 1) / columns + 31) / 32 * 32);
  const int64_t groups = (p.n + kRows<N, DIMS> - 1) / kRows<N, DIMS>;
  int64_t blocks = static_cast<int64_t>(multiprocessors("fsq_embed")) * (kResident / threads) / columns;
  if (blocks < 1) blocks = 1;
  // where rows take their positions in turn and it costs no block a group more, a block meets the same positions in
  // each of its groups and finds them in L1
  const int64_t table = p.position_rows / kRows<N, DIMS>, whole = table ? blocks / table * table : 0;
  if (whole && (groups + whole - 1) / whole == (groups + blocks - 1) / blocks) blocks = whole;
  const dim3 grid(static_cast<unsigned>(groups < blocks ? groups : blocks), static_cast<unsigned>(columns));
  launch({"fsq_embed", grid, static_cast<unsigned>(threads), stream, 0, 1, true}, fsq_embed_kernel<T, N, DIMS>, p);
}

template <typename T>
void embed_packs(const FsqEmbed& p, cudaStream_t stream) {
  bool packed = p.width % kPack<T> == 0;
  for (const void* data : {p.weight, p.bias, p.positions, p.tokens, static_cast<const void*>(p.out)}) {
    packed &= aligned16(data);
  }
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
