// Every PTX instruction the kernels use, one function each. The emulator of the tests declares the same functions as
// host C++ (tests/support/emulator/include/emulated_ptx.h), so no other file may hold `asm`.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "../core/dtype.h"

#ifdef FLEXKERNELS_EMULATOR
#include <emulated_ptx.h>
#else

#include <cuda_runtime.h>

#define FLEXKERNELS_PTX static __device__ __forceinline__

namespace flexkernels::cuda::ptx {

// addresses as instructions take them, for the functions below
FLEXKERNELS_PTX uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// where block `rank` of the cluster keeps what this block keeps at `shared`
FLEXKERNELS_PTX uint32_t cluster_address(const void* shared, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
}

// --- shared memory

// dynamic shared memory of the launch
template <typename T>
FLEXKERNELS_PTX T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// BYTES (4, 8 or 16) from global to shared memory in the background; zeros where !ok, without reading
template <int BYTES>
FLEXKERNELS_PTX void cp_async(void* shared, const void* global, bool ok = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint32_t to = shared_address(shared);
  const int bytes = ok ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(bytes)
                 : "memory");
  }
}

FLEXKERNELS_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// until at most GROUPS of this thread's groups are under way; other threads see the data after a barrier
template <int GROUPS>
FLEXKERNELS_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// barrier `id` (1 to 15) of `threads` threads, whole warps
FLEXKERNELS_PTX void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// counts for barrier_sync without waiting
FLEXKERNELS_PTX void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- matrix fragments. An 8 x 8 matrix of 16-bit elements: lane l holds row l / 4, columns 2 * (l % 4) + {0, 1}

// matrix i: lane 8 * i + r gives the address of its row r, 16 bytes in shared memory
FLEXKERNELS_PTX void ldmatrix(uint32_t (&m)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(m[0])
               : "r"(shared_address(row))
               : "memory");
}
FLEXKERNELS_PTX void ldmatrix(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(shared_address(row))
               : "memory");
}
FLEXKERNELS_PTX void ldmatrix(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
// the same, each matrix transposed
FLEXKERNELS_PTX void ldmatrix_trans(uint32_t (&m)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(m[0])
               : "r"(shared_address(row))
               : "memory");
}
FLEXKERNELS_PTX void ldmatrix_trans(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(shared_address(row))
               : "memory");
}
FLEXKERNELS_PTX void ldmatrix_trans(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// the transpose of a matrix that a warp holds
FLEXKERNELS_PTX uint32_t movmatrix(uint32_t m) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(m));
  return transposed;
}

// c [16 x 8] += a [16 x 16] b [16 x 8], float32 sums. With (g, t) = (lane / 4, lane % 4):
// a0, a1: rows g, g + 8 of columns 2 t + {0, 1}; a2, a3: the same of columns 2 t + 8 + {0, 1}
// b0, b1: rows 2 t + {0, 1}, 2 t + 8 + {0, 1} of column g;  c: rows g, g, g + 8, g + 8 of columns 2 t + {0, 1, 0, 1}
FLEXKERNELS_PTX void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
FLEXKERNELS_PTX void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// T: bf16 or f16
template <typename T>
FLEXKERNELS_PTX void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "mma takes bf16 or f16");
  std::is_same_v<T, bf16> ? mma_bf16(c, a0, a1, a2, a3, b0, b1) : mma_f16(c, a0, a1, a2, a3, b0, b1);
}

// --- bulk copies and the barriers (8 bytes of shared memory) that they complete on

FLEXKERNELS_PTX void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// after mbarrier_init and before __syncthreads(): what was initialised is visible to bulk copies and to the cluster
FLEXKERNELS_PTX void mbarrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
FLEXKERNELS_PTX void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// arrives, and the phase completes only after so many bytes more
FLEXKERNELS_PTX void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// whether the phase of this parity is complete (the first phase has parity 0); may wait a little
FLEXKERNELS_PTX bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(complete)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return complete;
}
// bounded: a barrier that nobody completes is an error of the launch, not a GPU that hangs
FLEXKERNELS_PTX void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#pragma unroll 1
  for (int i = 0; i < 1 << 22; ++i) {
    if (mbarrier_try_wait(barrier, parity)) return;
  }
  __trap();
}
// `bytes` (a multiple of 16) to shared memory of this block in the background; both sides on 16 bytes
FLEXKERNELS_PTX void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// how L2 treats what is read once
FLEXKERNELS_PTX uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
FLEXKERNELS_PTX void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// asks L2 for `bytes` (a multiple of 16, as p is); nothing before sm_90
FLEXKERNELS_PTX void prefetch(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// --- clusters

FLEXKERNELS_PTX int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
FLEXKERNELS_PTX int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
// all threads of the cluster that have not returned; what they wrote before is then visible to all. A block whose
// shared memory others read must not return before they have
FLEXKERNELS_PTX void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
FLEXKERNELS_PTX void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
FLEXKERNELS_PTX void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
FLEXKERNELS_PTX uint32_t cluster_load(const uint32_t* shared, int rank) {
  uint32_t x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(cluster_address(shared, rank)) : "memory");
  return x;
}
FLEXKERNELS_PTX uint64_t cluster_load(const uint64_t* shared, int rank) {
  uint64_t x;
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(x) : "r"(cluster_address(shared, rank)) : "memory");
  return x;
}
FLEXKERNELS_PTX float cluster_load(const float* shared, int rank) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(cluster_address(shared, rank)) : "memory");
  return x;
}
FLEXKERNELS_PTX float2 cluster_load(const float2* shared, int rank) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "r"(cluster_address(shared, rank))
               : "memory");
  return x;
}
FLEXKERNELS_PTX float4 cluster_load(const float4* shared, int rank) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(cluster_address(shared, rank))
               : "memory");
  return x;
}
FLEXKERNELS_PTX void cluster_store(uint32_t* shared, int rank, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(shared, rank)), "r"(x) : "memory");
}
FLEXKERNELS_PTX void cluster_store(uint64_t* shared, int rank, uint64_t x) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(cluster_address(shared, rank)), "l"(x) : "memory");
}
FLEXKERNELS_PTX void cluster_store(float* shared, int rank, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(cluster_address(shared, rank)), "f"(x) : "memory");
}
// atomic; returns what was there
FLEXKERNELS_PTX uint32_t cluster_add(uint32_t* shared, int rank, uint32_t x) {
  uint32_t before;
  asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(cluster_address(shared, rank)), "r"(x)
               : "memory");
  return before;
}
FLEXKERNELS_PTX uint64_t cluster_add(uint64_t* shared, int rank, uint64_t x) {
  uint64_t before;
  asm volatile("atom.shared::cluster.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "r"(cluster_address(shared, rank)), "l"(x)
               : "memory");
  return before;
}

// --- programmatic dependent launch (Launch::overlap); nothing without it

FLEXKERNELS_PTX void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// the kernels before this one are complete and visible
FLEXKERNELS_PTX void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- global memory: 16 bytes with hints

// not kept in L1; coherent
FLEXKERNELS_PTX uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
// zeros where !ok, without touching memory
FLEXKERNELS_PTX uint4 load_once(const void* p, bool ok) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@p ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(ok))
      : "memory");
  return v;
}
// and L2 fetches 256 bytes
FLEXKERNELS_PTX uint4 load_once_256(const void* p, bool ok) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@p ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(ok))
      : "memory");
  return v;
}
// data that no kernel under way writes; volatile, so the load stays where it is written
FLEXKERNELS_PTX uint4 load_constant(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// zeros where !ok, without touching memory
FLEXKERNELS_PTX uint4 load_constant(const void* p, bool ok) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(ok)));
  return v;
}
// and not kept in L1
FLEXKERNELS_PTX uint4 load_constant_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// --- global memory: order between the blocks of a GPU

FLEXKERNELS_PTX uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// four words, each of them whole
FLEXKERNELS_PTX uint4 load_relaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
FLEXKERNELS_PTX uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FLEXKERNELS_PTX void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FLEXKERNELS_PTX void store_relaxed(uint16_t* p, uint16_t v) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}
FLEXKERNELS_PTX void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FLEXKERNELS_PTX void add_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// returns what was there: counts a block whose writes precede it and shows it those of the blocks counted before
FLEXKERNELS_PTX uint32_t add_acquire_release(uint32_t* p, uint32_t v) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}

// --- arithmetic

// 2^x, log2 x, 1 / x, 1 / sqrt x to about 2 units in the last place; tanh x to 2^-11
FLEXKERNELS_PTX float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLEXKERNELS_PTX float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLEXKERNELS_PTX float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLEXKERNELS_PTX float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLEXKERNELS_PTX float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// a > b as 1 or 0
FLEXKERNELS_PTX float greater(float a, float b) {
  float y;
  asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// pairs of 16-bit floats in a word, the low half first; rounded to nearest even
FLEXKERNELS_PTX uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FLEXKERNELS_PTX uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FLEXKERNELS_PTX uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
#if __CUDA_ARCH__ >= 900
FLEXKERNELS_PTX uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
FLEXKERNELS_PTX uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
FLEXKERNELS_PTX uint32_t greater_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("set.gt.bf16x2.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
#else
// sm_80 has only the fused product: a * 1 + b, b * -1 + a
FLEXKERNELS_PTX uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return y;
}
FLEXKERNELS_PTX uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  return y;
}
FLEXKERNELS_PTX uint32_t greater_bf16x2(uint32_t a, uint32_t b) {
  const float low = greater(__uint_as_float(a << 16), __uint_as_float(b << 16));
  const float high = greater(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u));
  return pack_bf16(low, high);
}
#endif
// a * b + c, rounded once
FLEXKERNELS_PTX uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// hides from the compiler where v comes from: it would keep what it computed from v, in more registers
FLEXKERNELS_PTX void keep(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

}  // namespace flexkernels::cuda::ptx

#undef FLEXKERNELS_PTX
#endif
