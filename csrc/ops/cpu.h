// How a CPU op runs: the kernel of the ISA level at hand, its rows split over torch's threads.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../capability.h"
#include "../cpu/kernels.h"
#include "args.h"

#if defined(__x86_64__)
#define FLEXKERNELS_SELECT(kernel)                                                                          \
  (flexkernels::cpu_capability() == flexkernels::Capability::avx512_bf16 ? flexkernels::avx512_bf16::kernel \
   : flexkernels::cpu_capability() == flexkernels::Capability::avx512    ? flexkernels::avx512::kernel      \
   : flexkernels::cpu_capability() == flexkernels::Capability::avx2      ? flexkernels::avx2::kernel        \
                                                                         : flexkernels::baseline::kernel)
#else
#define FLEXKERNELS_SELECT(kernel) (flexkernels::baseline::kernel)
#endif

namespace flexkernels {

// elements of work that are worth a thread
constexpr int64_t kGrain = 16384;

// glibc maps a block above this anew for every allocation, so that its pages are faulted in again on every call
constexpr int64_t kMappedBytes = int64_t{32} << 20;

inline int64_t bytes_of(const OptionalTensor& t) {
  return t ? t->numel() * static_cast<int64_t>(t->element_size()) : 0;
}

// bytes read and written in one call that a common server's last cache does not hold
constexpr int64_t kCacheBytes = int64_t{32} << 20;

// asks for 2 MiB pages under a large output: a fault each instead of 512
inline void prefer_huge_pages(const Tensor& out) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const int64_t bytes = bytes_of(out);
  if (bytes < kMappedBytes) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
  // advice alone: a kernel without such pages refuses it, and nothing changes
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)out;
#endif
}

inline void prefer_huge_pages(const OptionalTensor& out) {
  if (out) prefer_huge_pages(*out);
}

inline int64_t grain_rows(int64_t elements_per_row) {
  return elements_per_row >= kGrain ? 1 : kGrain / (elements_per_row + 1) + 1;
}

template <typename Args>
void launch(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t elements_per_row) {
  if (rows == 0) return;
  torch::stable::parallel_for(0, rows, grain_rows(elements_per_row),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace flexkernels
