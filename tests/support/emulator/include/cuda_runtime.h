// The part of the CUDA runtime and of the device functions that kernels may use, as host C++.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
// a variable of the block: thread-local storage, whose address the runtime hands out (--wrap=__tls_get_addr); a gap
// before each, so that a step beyond one does not land in another
#define EMU_NAME(a, b) a##b
#define EMU_GAP(n) static __thread __attribute__((used, aligned(16))) unsigned char EMU_NAME(emu_gap, n)[16]
#define __shared__      \
  EMU_GAP(__COUNTER__); \
  static __thread
#define threadIdx (emu::thread_idx())
#define blockIdx (emu::block_idx())
// constant while a kernel runs, so that the compiler does not ask the hooks about them
extern const dim3 blockDim __asm__("emu_block_dim");
extern const dim3 gridDim __asm__("emu_grid_dim");
constexpr int warpSize = 32;

// --- runtime

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorAssert = 710
};
namespace emu {
inline const char* last_message = "no error";
inline std::map<const void*, size_t> max_shared;
}  // namespace emu
EMU_INLINE const char* cudaGetErrorString(cudaError_t) { return emu::last_message; }
EMU_INLINE cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13
};
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute what, int value) {
  if (what == cudaFuncAttributeMaxDynamicSharedMemorySize)
    emu::max_shared[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return attributes->ptxVersion = 90, cudaSuccess;
}

// a device with few multiprocessors: persistent grids stay small
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
EMU_INLINE cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
EMU_INLINE cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 * 1024;
  }
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int cooperative, programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename... Args>
EMU_HOST cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args...), Args... args) {
  const void* address = reinterpret_cast<const void*>(kernel);
  emu::Grid grid{config->gridDim, config->blockDim, dim3(1), config->dynamicSmemBytes, 48 * 1024, address};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& c = config->attrs[i].val.clusterDim;
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) grid.cluster = dim3(c.x, c.y, c.z);
  }
  if (emu::max_shared.count(address)) grid.max_shared = emu::max_shared[address];
  auto body = [&]() EMU_HOST { kernel(args...); };
  struct Call {
    static EMU_HOST void run(void* context) { (*static_cast<decltype(body)*>(context))(); }
  };
  const char* error = emu::run(grid, Call::run, &body);
  if (error) emu::last_message = error;
  return error ? cudaErrorAssert : cudaSuccess;
}

EMU_INLINE cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return memset(p, value, bytes), cudaSuccess;
}
extern "C" void emu_region(void* base, size_t bytes, const char* name, int output);
EMU_INLINE cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = aligned_alloc(256, (bytes + 255) / 256 * 256);
  emu_region(*p, bytes, "memory of cudaMalloc", 0);
  return cudaSuccess;
}
EMU_INLINE cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = nullptr, cudaSuccess;
}
EMU_INLINE cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
EMU_INLINE cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
constexpr unsigned cudaStreamNonBlocking = 1;
// nothing is ever captured
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
EMU_INLINE cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
EMU_INLINE cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                                unsigned long long* capture) {
  return *status = cudaStreamCaptureStatusNone, *capture = 0, cudaSuccess;
}

// --- bits and numbers

template <typename To, typename From>
EMU_INLINE To emu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
EMU_INLINE float __int_as_float(int x) { return emu_bits<float>(x); }
EMU_INLINE float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
EMU_INLINE int __float_as_int(float x) { return emu_bits<int>(x); }
EMU_INLINE unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
EMU_INLINE double __longlong_as_double(long long x) { return emu_bits<double>(x); }
EMU_INLINE long long __double_as_longlong(double x) { return emu_bits<long long>(x); }
EMU_INLINE unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
EMU_INLINE int __mulhi(int a, int b) { return static_cast<int64_t>(a) * b >> 32; }
EMU_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned __int128>(a) * b >> 64;
}
EMU_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
EMU_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMU_INLINE int __clz(int x) { return x ? __builtin_clz(x) : 32; }
EMU_INLINE int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
EMU_INLINE int __ffs(int x) { return __builtin_ffs(x); }
EMU_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
EMU_INLINE unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
EMU_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15, byte = both >> 8 * (pick & 7) & 255;
    out |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}
EMU_INLINE unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
EMU_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
EMU_INLINE int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}

#define EMU_MINMAX(T)                                  \
  EMU_INLINE T min(T a, T b) { return b < a ? b : a; } \
  EMU_INLINE T max(T a, T b) { return a < b ? b : a; }
EMU_MINMAX(int)
EMU_MINMAX(unsigned)
EMU_MINMAX(long)
EMU_MINMAX(unsigned long)
EMU_MINMAX(long long)
EMU_MINMAX(unsigned long long)
EMU_INLINE float min(float a, float b) { return fminf(a, b); }
EMU_INLINE float max(float a, float b) { return fmaxf(a, b); }
EMU_INLINE double min(double a, double b) { return fmin(a, b); }
EMU_INLINE double max(double a, double b) { return fmax(a, b); }
EMU_INLINE unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
EMU_INLINE unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
EMU_INLINE unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
EMU_INLINE unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
#undef EMU_MINMAX

// rounded where they stand: no compiler makes them part of a fused multiply-add
EMU_INLINE float emu_rounded(float a) {
  __asm__("" : "+x"(a));
  return a;
}
EMU_INLINE float __fadd_rn(float a, float b) { return emu_rounded(emu_rounded(a) + emu_rounded(b)); }
EMU_INLINE float __fsub_rn(float a, float b) { return emu_rounded(emu_rounded(a) - emu_rounded(b)); }
EMU_INLINE float __fmul_rn(float a, float b) { return emu_rounded(a * b); }
EMU_INLINE float __fdiv_rn(float a, float b) { return a / b; }
EMU_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_INLINE float __frcp_rn(float a) { return 1 / a; }
EMU_INLINE float __fsqrt_rn(float a) { return sqrtf(a); }
EMU_INLINE float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1) : 0; }
EMU_INLINE float rsqrtf(float a) { return static_cast<float>(1 / sqrt(static_cast<double>(a))); }
EMU_INLINE int __float2int_rn(float a) { return static_cast<int>(nearbyintf(a)); }
EMU_INLINE int __float2int_rz(float a) { return static_cast<int>(a); }
EMU_INLINE int __float2int_rd(float a) { return static_cast<int>(floorf(a)); }
EMU_INLINE int __float2int_ru(float a) { return static_cast<int>(ceilf(a)); }
EMU_INLINE unsigned __float2uint_rn(float a) { return static_cast<unsigned>(nearbyintf(a)); }
EMU_INLINE unsigned __float2uint_rz(float a) { return static_cast<unsigned>(a); }
EMU_INLINE float __int2float_rn(int a) { return static_cast<float>(a); }
EMU_INLINE float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
// the fast functions as CUDA defines them, with the last bit cut off: an error that code must bear
EMU_INLINE float emu_rough(double x, unsigned bits = 1) {
  const float y = static_cast<float>(x);
  return isfinite(y) ? emu_bits<float>(emu_bits<unsigned>(y) & ~((1u << bits) - 1)) : y;
}
EMU_INLINE float emu_expf(float a) { return emu_rough(exp2(static_cast<double>(a * 1.4426950408889634f))); }
EMU_INLINE float emu_log2f(float a) { return emu_rough(log2(static_cast<double>(a))); }
EMU_INLINE float emu_logf(float a) { return emu_log2f(a) * 0.6931471805599453f; }
// the C library has functions of these names
#define __expf emu_expf
#define __log2f emu_log2f
#define __logf emu_logf
EMU_INLINE float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f ? 0.0f : a * emu_rough(1.0 / b); }

// --- global memory

#define EMU_LOAD(NAME)            \
  template <typename T>           \
  EMU_INLINE T NAME(const T* p) { \
    return *p;                    \
  }
#define EMU_STORE(NAME)                 \
  template <typename T, typename V>     \
  EMU_INLINE void NAME(T* p, V value) { \
    *p = value;                         \
  }
EMU_LOAD(__ldg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldlu)
EMU_STORE(__stcg)
EMU_STORE(__stcs)
#undef EMU_LOAD
#undef EMU_STORE

#define EMU_ATOMIC(NAME, EXPRESSION)                                                 \
  template <typename T, typename V>                                                  \
  EMU_INLINE T NAME(T* p, V value, emu::Order order = emu::kRelaxed) {               \
    struct Apply {                                                                   \
      static EMU_HOST void run(void* at, const void* operand) {                      \
        const T x = *static_cast<const T*>(at), v = *static_cast<const T*>(operand); \
        *static_cast<T*>(at) = EXPRESSION;                                           \
      }                                                                              \
    };                                                                               \
    const T operand = static_cast<T>(value);                                         \
    T before;                                                                        \
    emu::atomic(p, sizeof(T), Apply::run, &operand, &before, order);                 \
    return before;                                                                   \
  }                                                                                  \
  template <typename T, typename V>                                                  \
  EMU_INLINE T NAME##_block(T* p, V value) {                                         \
    return NAME(p, value);                                                           \
  }
EMU_ATOMIC(atomicAdd, x + v)
EMU_ATOMIC(atomicSub, x - v)
EMU_ATOMIC(atomicMin, v < x ? v : x)
EMU_ATOMIC(atomicMax, x < v ? v : x)
EMU_ATOMIC(atomicAnd, x& v)
EMU_ATOMIC(atomicOr, x | v)
EMU_ATOMIC(atomicXor, x ^ v)
EMU_ATOMIC(atomicExch, ((void)x, v))
EMU_ATOMIC(atomicInc, x >= v ? 0 : x + 1)
#undef EMU_ATOMIC
template <typename T, typename V>
EMU_INLINE T atomicCAS(T* p, V expected, V value) {
  struct Apply {
    static EMU_HOST void run(void* at, const void* operand) {
      const T* pair = static_cast<const T*>(operand);
      if (*static_cast<T*>(at) == pair[0]) *static_cast<T*>(at) = pair[1];
    }
  };
  const T pair[2] = {T(expected), T(value)};
  T before;
  emu::atomic(p, sizeof(T), Apply::run, pair, &before, emu::kRelaxed);
  return before;
}
EMU_INLINE void __threadfence() { emu::fence(); }
EMU_INLINE void __threadfence_block() { emu::fence(); }
EMU_INLINE void __threadfence_system() { emu::fence(); }
[[noreturn]] EMU_INLINE void __trap() { emu::trap(); }
EMU_INLINE void __nanosleep(unsigned) { emu::poll(); }
EMU_INLINE long long clock64() { return 0; }

// --- barriers and warps

EMU_INLINE void __syncthreads() { emu::block_barrier(0, 0, emu::kNone, 0); }
EMU_INLINE int __syncthreads_count(int p) { return emu::block_barrier(0, 0, emu::kCount, p); }
EMU_INLINE int __syncthreads_and(int p) { return emu::block_barrier(0, 0, emu::kAnd, p); }
EMU_INLINE int __syncthreads_or(int p) { return emu::block_barrier(0, 0, emu::kOr, p); }
EMU_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_warp(mask); }

EMU_INLINE unsigned emu_lane() {
  const uint3 t = threadIdx;
  const dim3 d = blockDim;
  return (t.x + d.x * (t.y + d.y * t.z)) % 32;
}
template <typename T>
EMU_INLINE T emu_shuffle(unsigned mask, T value, int source, int low, int high) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  // out of range: its own value
  bits = emu::shuffle(mask, bits, source < low || source > high ? emu_lane() : source);
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
EMU_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emu_lane(), first = lane / width * width;
  return emu_shuffle(mask, value, first + (source & (width - 1)), 0, 31);
}
template <typename T>
EMU_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = emu_lane();
  return emu_shuffle(mask, value, lane - static_cast<int>(by), lane / width * width, 31);
}
template <typename T>
EMU_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = emu_lane();
  return emu_shuffle(mask, value, lane + static_cast<int>(by), 0, lane / width * width + width - 1);
}
template <typename T>
EMU_INLINE T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  const int lane = emu_lane();
  return emu_shuffle(mask, value, lane ^ with, 0, lane / width * width + width - 1);
}
EMU_INLINE unsigned __ballot_sync(unsigned mask, int predicate) { return emu::ballot(mask, predicate); }
EMU_INLINE int __any_sync(unsigned mask, int predicate) { return emu::ballot(mask, predicate) != 0; }
EMU_INLINE int __all_sync(unsigned mask, int predicate) { return emu::ballot(mask, !predicate) == 0; }
template <typename T>
EMU_INLINE unsigned __match_any_sync(unsigned mask, T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return emu::match(mask, bits, false, nullptr);
}
template <typename T>
EMU_INLINE unsigned __match_all_sync(unsigned mask, T value, int* equal) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  int same;
  const unsigned lanes = emu::match(mask, bits, true, &same);
  *equal = same;
  return lanes;
}
EMU_INLINE unsigned __reduce_add_sync(unsigned mask, unsigned v) { return emu::reduce(mask, v, emu::kAdd); }
EMU_INLINE int __reduce_add_sync(unsigned mask, int v) { return emu::reduce(mask, v, emu::kAdd); }
EMU_INLINE unsigned __reduce_min_sync(unsigned mask, unsigned v) { return emu::reduce(mask, v, emu::kMin); }
EMU_INLINE int __reduce_min_sync(unsigned mask, int v) { return emu::reduce(mask, v, emu::kMinSigned); }
EMU_INLINE unsigned __reduce_max_sync(unsigned mask, unsigned v) { return emu::reduce(mask, v, emu::kMax); }
EMU_INLINE int __reduce_max_sync(unsigned mask, int v) { return emu::reduce(mask, v, emu::kMaxSigned); }
EMU_INLINE unsigned __reduce_and_sync(unsigned mask, unsigned v) { return emu::reduce(mask, v, emu::kBitAnd); }
EMU_INLINE unsigned __reduce_or_sync(unsigned mask, unsigned v) { return emu::reduce(mask, v, emu::kBitOr); }
EMU_INLINE unsigned __reduce_xor_sync(unsigned mask, unsigned v) { return emu::reduce(mask, v, emu::kBitXor); }
