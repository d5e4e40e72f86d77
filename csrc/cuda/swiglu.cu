// SwiGLU: a block does a stretch of a row, U words of each half in flight a thread. A word is an element, or two of 16
// bits where the halves of a row hold whole pairs.
#include "norm.h"

namespace flexkernels::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 5;

template <typename X, bool PAIRS>
struct Words {
  static constexpr int N = PAIRS ? 2 : 1;
  using Word = std::conditional_t<sizeof(X) == 4 || PAIRS, uint32_t, uint16_t>;

  static __device__ __forceinline__ void unpack(Word w, float (&v)[N]) {
    if constexpr (PAIRS) {
      unpack_pair<X>(w, v[0], v[1]);
    } else if constexpr (sizeof(X) == 4) {
      v[0] = float_of_bits(w);
    } else {
      v[0] = to_float(X{w});
    }
  }

  static __device__ __forceinline__ Word pack(const float (&v)[N]) {
    if constexpr (PAIRS) {
      return pack_pair<X>(v[0], v[1]);
    } else if constexpr (sizeof(X) == 4) {
      return bits_of_float(v[0]);
    } else {
      X x;
      from_float(v[0], &x);
      return x.bits;
    }
  }
};

// 1 / (1 + e^-a); float32 results need the exact functions, 16 bits do not show the difference
template <typename X>
__device__ __forceinline__ float sigmoid(float a) {
  return sizeof(X) == 4 ? 1.0f / (1.0f + expf(-a)) : __fdividef(1.0f, 1.0f + __expf(-a));
}

// the words [begin, end) of a row's half that this block does
struct Stretch {
  int64_t begin, end;
};

__device__ __forceinline__ Stretch stretch(int64_t words, int64_t each) {
  const int64_t begin = blockIdx.y * each;
  return {begin, begin + each < words ? begin + each : words};
}

template <typename X, bool PAIRS>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Swiglu p, int64_t each) {
  using W = Words<X, PAIRS>;
  using Word = typename W::Word;
  const int64_t row = blockIdx.x, words = p.h / W::N;
  const Word* a = reinterpret_cast<const Word*>(static_cast<const X*>(p.x) + row * p.x_stride);
  const Word* b = a + words;
  Word* out = static_cast<Word*>(p.out) + row * words;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const Stretch own = stretch(words, each);
  for (int64_t base = own.begin + threadIdx.x; base < own.end; base += kThreads * kUnroll) {
    Word raw_a[kUnroll] = {}, raw_b[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (const int64_t i = base + u * kThreads; i < own.end) raw_a[u] = __ldcs(a + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (const int64_t i = base + u * kThreads; i < own.end) raw_b[u] = __ldcs(b + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i >= own.end) continue;
      float gate[W::N], up[W::N];
      W::unpack(raw_a[u], gate);
      W::unpack(raw_b[u], up);
#pragma unroll
      for (int j = 0; j < W::N; ++j) up[j] *= gate[j] * sigmoid<X>(gate[j]);
      out[i] = W::pack(up);
    }
  }
}

// d silu(a) / da = s * (1 + a * (1 - s)) with s = sigmoid(a)
template <typename X, bool PAIRS>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ Swiglu p, int64_t each) {
  using W = Words<X, PAIRS>;
  using Word = typename W::Word;
  const int64_t row = blockIdx.x, words = p.h / W::N;
  const Word* a = reinterpret_cast<const Word*>(static_cast<const X*>(p.x) + row * p.x_stride);
  const Word *b = a + words, *grad_out = static_cast<const Word*>(p.grad_out) + row * words;
  Word *grad_a = static_cast<Word*>(p.out) + 2 * row * words, *grad_b = grad_a + words;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const Stretch own = stretch(words, each);
  for (int64_t base = own.begin + threadIdx.x; base < own.end; base += kThreads * kUnroll) {
    Word raw_a[kUnroll] = {}, raw_b[kUnroll] = {}, raw_grad[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i >= own.end) continue;
      raw_a[u] = __ldcs(a + i);
      raw_b[u] = __ldcs(b + i);
      raw_grad[u] = __ldcs(grad_out + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i >= own.end) continue;
      float gate[W::N], up[W::N], grad[W::N];
      W::unpack(raw_a[u], gate);
      W::unpack(raw_b[u], up);
      W::unpack(raw_grad[u], grad);
#pragma unroll
      for (int j = 0; j < W::N; ++j) {
        const float s = sigmoid<X>(gate[j]), silu = gate[j] * s;
        gate[j] = grad[j] * up[j] * s * (1.0f + gate[j] * (1.0f - s));
        up[j] = grad[j] * silu;
      }
      grad_a[i] = W::pack(gate);
      grad_b[i] = W::pack(up);
    }
  }
}

template <typename X, bool PAIRS>
void words(const Swiglu& p, cudaStream_t stream) {
  const int64_t words = p.h / Words<X, PAIRS>::N, parts = (words + kThreads * kUnroll - 1) / (kThreads * kUnroll);
  // equal stretches of whole 128-byte lines
  const int64_t each = ((words + parts - 1) / parts + 31) / 32 * 32;
  const dim3 grid(static_cast<unsigned>(p.n), static_cast<unsigned>((words + each - 1) / each));
  launch({"swiglu", grid, kThreads, stream, 0, 1, true},
         p.grad_out ? backward_kernel<X, PAIRS> : forward_kernel<X, PAIRS>, p, each);
}

template <typename X>
void swiglu(const Swiglu& p, cudaStream_t stream) {
  if constexpr (sizeof(X) == 2) {
    const auto paired = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 4 == 0; };
    if (p.h % 2 == 0 && p.x_stride % 2 == 0 && paired(p.x) && paired(p.grad_out)) return words<X, true>(p, stream);
  }
  words<X, false>(p, stream);
}

}  // namespace

void swiglu_launch(const Swiglu& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  if (p.dtype == Dtype::f32) swiglu<float>(p, stream);
  if (p.dtype == Dtype::bf16) swiglu<bf16>(p, stream);
  if (p.dtype == Dtype::f16) swiglu<f16>(p, stream);
}

void swiglu_backward_launch(const Swiglu& p, void* queue) { swiglu_launch(p, queue); }

}  // namespace flexkernels::cuda
