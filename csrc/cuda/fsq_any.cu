// FSQ of any level set and form, and fsq_quantize_train: a block a tile of rows, a thread a row. Thresholds and rows
// are in shared memory; a thread begins with the dimension of its own number, so that a warp's rows, a power of two of
// words apart perhaps, do not all meet in one bank.
#include "../core/fsq_train.h"

#include "fsq.h"

namespace flexkernels::cuda {
namespace {

constexpr int kRows = 128;

struct Dim {
  int64_t basis;
  int level;
  float half, inverse;         // L // 2 and its reciprocal
  float scale, offset, shift;  // bound(z) = tanh(z + shift) * scale - offset
};

// the terms as PyTorch computes them on this device
__device__ void fill(const FsqQuantize& p, int d, Dim* dim) {
  dim->basis = p.basis[d];
  dim->level = p.levels[d];
  dim->half = static_cast<float>(p.levels[d] / 2);
  dim->inverse = 1.0f / dim->half;
  dim->offset = p.levels[d] % 2 ? 0.0f : 0.5f;
  dim->scale = __fmul_rn(static_cast<float>(p.levels[d] - 1), 1.001f) * 0.5f;
  dim->shift = atanhf(__fdiv_rn(dim->offset, dim->scale));
}

// the tile as packs of 16 bytes where both ends are aligned; kRows rows are whole packs
template <typename T>
__device__ void copy(T* to, const T* from, int count, bool packed) {
  const int packs = packed ? count / kPack<T> : 0;
  for (int i = threadIdx.x; i < packs; i += kRows) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  for (int e = packs * kPack<T> + threadIdx.x; e < count; e += kRows) to[e] = from[e];
}

template <typename T, bool TRAIN>
__global__ void __launch_bounds__(kRows) fsq_any_kernel(const __grid_constant__ FsqTrain train, bool packed) {
  const FsqQuantize& p = train.rows;
  __shared__ Dim dims[kFsqMaxDims];
  // [kRows, dims], then [dims, width]
  T* tile = ptx::dynamic_shared<T>();
  float* thresholds = reinterpret_cast<float*>(tile + kRows * p.dims);
  const int thread = threadIdx.x;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, row = first + thread;
  const int rows = p.n - first < kRows ? static_cast<int>(p.n - first) : kRows, count = rows * p.dims;
  if (thread < p.dims) fill(p, thread, dims + thread);
  for (int i = thread; i < p.dims * p.width; i += kRows) thresholds[i] = p.thresholds[i];
  copy(tile, static_cast<const T*>(p.z) + first * p.dims, count, packed);
  __syncthreads();

  if (thread < rows) {
    bool dropped = false, replaced = false;
    int64_t id = 0;
    if constexpr (TRAIN) {
      const FsqStream stream = fsq_stream(train);
      const FsqSample sample = fsq_sample(train, stream, fsq_sample_of(train, row));
      dropped = sample.dropped;
      if (train.replaced) {
        uint32_t word[4];
        fsq_words(stream, static_cast<uint64_t>(row), kFsqOfToken, word);
        replaced = word[0] < sample.replace;
        train.replaced[row] = replaced;
        id = static_cast<int64_t>(fsq_drawn(word) % static_cast<uint64_t>(p.codebook));
      }
    }
    T* own = tile + thread * p.dims;
    if (replaced) {
      int64_t rest = id;
      for (int d = 0; d < p.dims; ++d) {
        const int64_t above = rest / dims[d].level;
        const float level = static_cast<float>(rest - above * dims[d].level);
        from_float(fsq_quotient(level - dims[d].half, dims[d].half, dims[d].inverse), own + d);
        rest = above;
      }
    } else {
      id = 0;
      int d = thread % p.dims;
      for (int i = 0; i < p.dims; ++i) {
        const Dim& dim = dims[d];
        const float z = to_float(own[d]);
        const int level = fsq_level(thresholds + d * p.width, p.width, z);
        id += level * dim.basis;
        float code;
        if (TRAIN && dropped) {
          const float bound = __fsub_rn(__fmul_rn(tanhf(z + dim.shift), dim.scale), dim.offset);
          code = __fdiv_rn(bound, dim.half);
        } else if (p.table) {
          code = p.table[d * (p.width + 1) + level];
        } else {
          code = fsq_quotient(static_cast<float>(level) - dim.half, dim.half, dim.inverse);
        }
        from_float(code, own + d);
        d = d + 1 < p.dims ? d + 1 : 0;
      }
    }
    if (p.ids) fsq_store_id(p.ids, p.id_type, row, id);
  }
  if (!p.codes) return;
  __syncthreads();
  copy(static_cast<T*>(p.codes) + first * p.dims, tile, count, packed);
}

template <bool TRAIN>
void any(const char* op, const FsqTrain& p, void* queue) {
  const FsqQuantize& q = p.rows;
  with_float(q.dtype, [&](auto element) {
    using T = decltype(element);
    const size_t shared = (kRows * sizeof(T) + q.width * sizeof(float)) * q.dims;
    launch(
        {op, fsq_blocks(q.n, kRows), kRows, static_cast<cudaStream_t>(queue), static_cast<unsigned>(shared), 1, true},
        fsq_any_kernel<T, TRAIN>, p, aligned16(q.z) && aligned16(q.codes));
  });
}

}  // namespace

void fsq_quantize_any_launch(const FsqQuantize& p, void* queue) {
  FsqTrain all{};
  all.rows = p;
  any<false>("fsq_quantize", all, queue);
}

void fsq_train_launch(const FsqTrain& p, void* queue) { any<true>("fsq_quantize_train", p, queue); }

}  // namespace flexkernels::cuda
