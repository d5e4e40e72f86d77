// csrc/cuda/ptx.h as host C++; what the functions mean stands there.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace flexkernels::cuda::ptx {

template <typename T>
EMU_INLINE T* dynamic_shared() {
  return static_cast<T*>(emu::dynamic_shared());
}
template <int BYTES>
EMU_INLINE void cp_async(void* shared, const void* global, bool ok = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  emu::cp_async(shared, global, BYTES, ok);
}
EMU_INLINE void cp_async_commit() { emu::cp_async_commit(); }
template <int GROUPS>
EMU_INLINE void cp_async_wait() {
  emu::cp_async_wait(GROUPS);
}
EMU_INLINE void barrier_sync(int id, int threads) { emu::block_barrier(id, threads, emu::kNone, 0); }
EMU_INLINE void barrier_arrive(int id, int threads) { emu::named_arrive(id, threads); }

template <int N>
EMU_INLINE void ldmatrix(uint32_t (&m)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  emu::ldmatrix(m, N, row, false);
}
template <int N>
EMU_INLINE void ldmatrix_trans(uint32_t (&m)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  emu::ldmatrix(m, N, row, true);
}
EMU_INLINE uint32_t movmatrix(uint32_t m) { return emu::movmatrix(m); }
template <bool HALF>
EMU_INLINE void emu_mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const emu::Fragment sum = emu::mma({{c[0], c[1], c[2], c[3]}}, {a0, a1, a2, a3, b0, b1}, HALF);
  for (int i = 0; i < 4; ++i) c[i] = sum.c[i];
}
EMU_INLINE void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emu_mma<false>(c, a0, a1, a2, a3, b0, b1);
}
EMU_INLINE void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emu_mma<true>(c, a0, a1, a2, a3, b0, b1);
}
template <typename T>
EMU_INLINE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "mma takes bf16 or f16");
  emu_mma<std::is_same_v<T, f16>>(c, a0, a1, a2, a3, b0, b1);
}

EMU_INLINE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emu::mbarrier_init(barrier, arrivals); }
EMU_INLINE void mbarrier_fence() {}
EMU_INLINE void mbarrier_arrive(uint64_t* barrier) { emu::mbarrier_arrive(barrier, 0); }
EMU_INLINE void mbarrier_expect(uint64_t* barrier, uint32_t bytes) { emu::mbarrier_arrive(barrier, bytes); }
EMU_INLINE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) { return emu::mbarrier_test(barrier, parity); }
EMU_INLINE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!emu::mbarrier_test(barrier, parity)) {
  }
}
EMU_INLINE uint64_t evict_first() { return 0; }
EMU_INLINE void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint64_t = 0) {
  emu::bulk_copy(shared, global, bytes, barrier);
}

// reads its ends, so that memory that does not exist is seen
EMU_INLINE void prefetch(const void* p, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % 16 || bytes % 16) emu::trap();
  static_cast<void>(static_cast<const volatile char*>(p)[0]);
  static_cast<void>(static_cast<const volatile char*>(p)[bytes - 1]);
}

EMU_INLINE int cluster_rank() { return emu::cluster_rank(); }
EMU_INLINE int cluster_size() { return emu::cluster_size(); }
EMU_INLINE void cluster_arrive() { emu::cluster_arrive(); }
EMU_INLINE void cluster_wait() { emu::cluster_wait(); }
EMU_INLINE void cluster_sync() {
  emu::cluster_arrive();
  emu::cluster_wait();
}
template <typename T>
EMU_INLINE T cluster_load(const T* shared, int rank) {
  return *static_cast<const T*>(emu::cluster_map(shared, rank));
}
template <typename T>
EMU_INLINE void cluster_store(T* shared, int rank, T x) {
  *static_cast<T*>(emu::cluster_map(shared, rank)) = x;
}
template <typename T>
EMU_INLINE T cluster_add(T* shared, int rank, T x) {
  return atomicAdd(static_cast<T*>(emu::cluster_map(shared, rank)), x);
}

EMU_INLINE void launch_dependents() {}
EMU_INLINE void wait_for_predecessors() {}

EMU_INLINE uint4 load_once(const void* p) { return *static_cast<const uint4*>(p); }
EMU_INLINE uint4 load_once(const void* p, bool ok) { return ok ? *static_cast<const uint4*>(p) : uint4{0, 0, 0, 0}; }
EMU_INLINE uint4 load_once_256(const void* p, bool ok) { return load_once(p, ok); }
EMU_INLINE uint4 load_constant(const void* p) { return load_once(p); }
EMU_INLINE uint4 load_constant(const void* p, bool ok) { return load_once(p, ok); }
EMU_INLINE uint4 load_constant_once(const void* p) { return load_once(p); }

template <typename T>
EMU_INLINE T emu_load(const T* p, emu::Order order) {
  T v;
  emu::load(&v, p, sizeof v, order);
  return v;
}
EMU_INLINE uint32_t load_relaxed(const uint32_t* p) { return emu_load(p, emu::kRelaxed); }
EMU_INLINE uint4 load_relaxed(const uint4* p) { return emu_load(p, emu::kRelaxed); }
EMU_INLINE uint32_t load_acquire(const uint32_t* p) { return emu_load(p, emu::kAcquire); }
EMU_INLINE void store_relaxed(uint32_t* p, uint32_t v) { emu::store(p, &v, sizeof v, emu::kRelaxed); }
EMU_INLINE void store_relaxed(uint16_t* p, uint16_t v) { emu::store(p, &v, sizeof v, emu::kRelaxed); }
EMU_INLINE void store_release(uint32_t* p, uint32_t v) { emu::store(p, &v, sizeof v, emu::kRelease); }
EMU_INLINE void add_release(uint32_t* p, uint32_t v) { atomicAdd(p, v, emu::kRelease); }
EMU_INLINE uint32_t add_acquire_release(uint32_t* p, uint32_t v) { return atomicAdd(p, v, emu::kAcquireRelease); }

EMU_INLINE float exp2_approx(float x) { return emu_rough(exp2(static_cast<double>(x))); }
EMU_INLINE float log2_approx(float x) { return emu_rough(log2(static_cast<double>(x))); }
EMU_INLINE float rcp_approx(float x) { return emu_rough(1 / static_cast<double>(x)); }
EMU_INLINE float rsqrt_approx(float x) { return emu_rough(1 / sqrt(static_cast<double>(x))); }
EMU_INLINE float tanh_approx(float x) { return emu_rough(tanh(static_cast<double>(x)), 12); }
EMU_INLINE float greater(float a, float b) { return a > b ? 1.0f : 0.0f; }

EMU_INLINE uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16_rn(low).__x | static_cast<uint32_t>(__float2bfloat16_rn(high).__x) << 16;
}
EMU_INLINE uint32_t pack_f16(float low, float high) {
  return __float2half_rn(low).__x | static_cast<uint32_t>(__float2half_rn(high).__x) << 16;
}
EMU_INLINE float emu_half(uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); }
EMU_INLINE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  return pack_f16(emu_half(a) - emu_half(b), emu_half(a >> 16) - emu_half(b >> 16));
}
EMU_INLINE float emu_low(uint32_t x) { return __uint_as_float(x << 16); }
EMU_INLINE float emu_high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
EMU_INLINE uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(emu_low(a) + emu_low(b), emu_high(a) + emu_high(b));
}
EMU_INLINE uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(emu_low(a) - emu_low(b), emu_high(a) - emu_high(b));
}
EMU_INLINE uint32_t greater_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(greater(emu_low(a), emu_low(b)), greater(emu_high(a), emu_high(b)));
}
EMU_INLINE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return pack_bf16(fmaf(emu_low(a), emu_low(b), emu_low(c)), fmaf(emu_high(a), emu_high(b), emu_high(c)));
}

EMU_INLINE void keep(uint4&) {}

}  // namespace flexkernels::cuda::ptx
