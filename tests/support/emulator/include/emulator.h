// What the emulated headers call: the runtime in ../runtime.cpp, ../memory.cpp and ../warp.cpp.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "vector_types.h"

// code between a kernel and the runtime whose own memory accesses are none of the kernel's
#define EMU_HOST __attribute__((no_sanitize("thread")))
// what kernels call becomes part of them, so that the address of an access or a call leads to the kernel's line
#define EMU_INLINE static inline __attribute__((always_inline))

namespace emu {

struct Grid {
  dim3 grid, block, cluster;
  size_t shared;       // dynamic, bytes
  size_t max_shared;   // what the kernel's attribute allows
  const void* kernel;  // its address, for its name
};

// runs body(context) as every thread of the grid; nullptr, or what went wrong
const char* run(const Grid& grid, void (*body)(void*), void* context);

// of the thread that runs
uint3 thread_idx() __attribute__((const));
uint3 block_idx() __attribute__((const));
unsigned cluster_rank();
unsigned cluster_size();

// ends the launch with this message, the kernel's name and the line of the caller
[[noreturn]] void trap();
// lets others run; a thread that waits for memory calls it again and again
void poll();

// --- memory. The kernel's own loads and stores come from the compiler's hooks, atomic ones from here
enum Order { kRelaxed = 0, kAcquire = 1, kRelease = 2, kAcquireRelease = 3 };
void load(void* to, const void* p, unsigned bytes, Order order);
void store(void* p, const void* from, unsigned bytes, Order order);
// apply(p, operand) changes what is at p
void atomic(void* p, unsigned bytes, void (*apply)(void*, const void*), const void* operand, void* before, Order order);
void fence();  // __threadfence
void* dynamic_shared();
void* cluster_map(const void* shared, unsigned rank);

void cp_async(void* shared, const void* global, unsigned bytes, bool ok);
void cp_async_commit();
void cp_async_wait(unsigned groups);
void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive(uint64_t* barrier, int bytes);
bool mbarrier_test(uint64_t* barrier, unsigned parity);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier);

// --- barriers
enum Vote { kNone, kCount, kAnd, kOr };
int block_barrier(int id, unsigned threads, Vote vote, int predicate);
void named_arrive(int id, unsigned threads);
void cluster_arrive();
void cluster_wait();

// --- lanes of a warp meet
void sync_warp(unsigned mask);
// the value of lane `source`
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source);
unsigned ballot(unsigned mask, bool predicate);
unsigned match(unsigned mask, uint64_t value, bool all, int* equal);
enum Reduction { kAdd, kMin, kMax, kMinSigned, kMaxSigned, kBitAnd, kBitOr, kBitXor };
unsigned reduce(unsigned mask, unsigned value, Reduction what);
struct Fragment {
  float c[4];
};
Fragment mma(Fragment c, const uint32_t (&ab)[6], bool half);
uint32_t movmatrix(uint32_t m);
void ldmatrix(uint32_t* m, int count, const void* row, bool transposed);

}  // namespace emu
