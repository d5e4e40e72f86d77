// What the files of csrc/ops share. Each is compiled for the CPU and, with FLEXKERNELS_CUDA defined, for CUDA: it
// checks tensors, allocates the results, and launches the kernels of its device.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "../core/dtype.h"

#ifdef FLEXKERNELS_CUDA
#include "../cuda/kernels.h"
#ifndef FLEXKERNELS_EMULATOR
#define FLEXKERNELS_KEY CUDA
#define FLEXKERNELS_SPACE flexkernels
#else
#define FLEXKERNELS_KEY CPU
#define FLEXKERNELS_SPACE flexkernels_emulated
#endif
#else
#define FLEXKERNELS_KEY CPU
#define FLEXKERNELS_SPACE flexkernels
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include "../capability.h"
#include "../cpu/kernels.h"
#endif

// FLEXKERNELS_OPS(m) { m.impl("name", TORCH_BOX(&function)); } registers ops for the device of this compilation; their
// schemas are in flexkernels/*.py, where a pure-Python install needs them
#define FLEXKERNELS_EXPAND(macro, ...) macro(__VA_ARGS__)
#define FLEXKERNELS_OPS(m) FLEXKERNELS_EXPAND(STABLE_TORCH_LIBRARY_IMPL, FLEXKERNELS_SPACE, FLEXKERNELS_KEY, m)

namespace flexkernels {

#ifdef FLEXKERNELS_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// checks

inline void check_device(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of the first argument (index ",
                  like.get_device_index(), "), got another (index ", t.get_device_index(), ")");
}

inline void check_layout(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous, got strides of another layout");
  check_device(name, t, like);
}

inline void check_numel(const char* name, const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
}

inline void check_dim(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", t.size(dim));
}

inline void check_scalar_type(const char* name, const Tensor& t, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must have dtype ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_tensor(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> sizes,
                         const Tensor& like) {
  check_scalar_type(name, t, type);
  check_device(name, t, like);
  check_dim(name, t, static_cast<int64_t>(sizes.size()));
  int64_t d = 0;
  for (const int64_t size : sizes) check_size(name, t, d++, size);
}

inline void check_shape(const char* name, const Tensor& t, const Tensor& like) {
  check_device(name, t, like);
  check_dim(name, t, like.dim());
  for (int64_t d = 0; d < like.dim(); ++d) check_size(name, t, d, like.size(d));
}

inline void check_like(const char* name, const Tensor& t, const Tensor& like) {
  check_scalar_type(name, t, like.scalar_type());
  check_shape(name, t, like);
}

inline void check_finite(const char* name, double value) {
  STD_TORCH_CHECK(isfinite(value), name, " must be finite, got ", value);
}

inline void check_between(const char* name, double value, double low, double high) {
  STD_TORCH_CHECK(value >= low && value <= high, name, " must lie between ", low, " and ", high, ", got ", value);
}

inline void check_eps(double eps) {
  STD_TORCH_CHECK(isfinite(eps) && eps >= 0, "eps must be finite and at least 0, got ", eps);
}

inline Dtype float_dtype(const char* name, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must have dtype float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::Half ? Dtype::f16 : Dtype::bf16;
}

inline Dtype float_dtype(const char* name, const Tensor& t) { return float_dtype(name, t.scalar_type()); }

// whether to look at numbers inside tensors: on the CPU; on a GPU, where it waits, under FLEXKERNELS_CHECK=1
inline bool values_are_checked() {
  const char* set = kCuda ? getenv("FLEXKERNELS_CHECK") : "1";
  return set && *set && *set != '0';
}

// data

template <typename T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// the data of an optional contiguous tensor of a known dtype and size; null when absent
template <typename T>
const T* read_optional(const char* name, const OptionalTensor& t, ScalarType type, int64_t numel, const Tensor& like) {
  if (!t) return nullptr;
  check_scalar_type(name, *t, type);
  check_numel(name, *t, numel);
  check_layout(name, *t, like);
  return read<T>(*t);
}

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor as_contiguous(const OptionalTensor& t) {
  if (t) return as_contiguous(*t);
  return t;
}

// t itself where its last dimension is dense, else a contiguous copy
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return last < 0 || t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline OptionalTensor dense_rows(const OptionalTensor& t) {
  if (t) return dense_rows(*t);
  return t;
}

// a contiguous tensor in the host's memory
inline Tensor on_host(const Tensor& t) {
  return kCuda ? torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)) : t;
}

inline Tensor on_device_of(const Tensor& like, const Tensor& t) {
  return kCuda ? torch::stable::to(t, like.device()) : t;
}

// t where its values may be looked at: on a GPU, where that waits, a copy under FLEXKERNELS_CHECK=1 alone, else none
inline OptionalTensor readable(const OptionalTensor& t) {
  if (!kCuda || !t) return t;
  if (values_are_checked()) return on_host(*t);
  return std::nullopt;
}

inline int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }
inline int64_t bytes_of(const OptionalTensor& t) { return t ? bytes_of(*t) : 0; }

#ifdef FLEXKERNELS_CUDA

#ifdef FLEXKERNELS_EMULATOR
inline void* current_stream(const Tensor&) { return nullptr; }
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};
#else
inline void* current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return stream;
}
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
#endif

// FLEXKERNELS_LAUNCH(kernel, args, like, items, elements): on `like`'s device, queued on torch's current stream
template <typename Args>
void launch(void (*queue)(const Args&, void*), const Args& args, const Tensor& like, int64_t items) {
  if (items == 0) return;
  const OnDevice guard(like);
  queue(args, current_stream(like));
}
#define FLEXKERNELS_LAUNCH(kernel, args, like, items, elements) launch(cuda::kernel##_launch, args, like, items)

inline void prefer_huge_pages(const Tensor&) {}
inline void poison(const Tensor& t) { cuda::poison(t.mutable_data_ptr(), bytes_of(t), current_stream(t)); }

#else

#if defined(__x86_64__)
#define FLEXKERNELS_SELECT(kernel)                                                                          \
  (flexkernels::cpu_capability() == flexkernels::Capability::avx512_bf16 ? flexkernels::avx512_bf16::kernel \
   : flexkernels::cpu_capability() == flexkernels::Capability::avx512    ? flexkernels::avx512::kernel      \
   : flexkernels::cpu_capability() == flexkernels::Capability::avx2      ? flexkernels::avx2::kernel        \
                                                                         : flexkernels::baseline::kernel)
#else
#define FLEXKERNELS_SELECT(kernel) (flexkernels::baseline::kernel)
#endif

// elements of work that are worth a thread
constexpr int64_t kGrain = 16384;
// bytes read and written in one call that a common server's last cache does not hold
constexpr int64_t kCacheBytes = int64_t{32} << 20;
// glibc maps a block above this anew for every allocation, so that its pages are faulted in again on every call
constexpr int64_t kMappedBytes = int64_t{32} << 20;

inline int64_t grain_rows(int64_t elements_per_row) {
  return elements_per_row >= kGrain ? 1 : kGrain / (elements_per_row + 1) + 1;
}

// FLEXKERNELS_LAUNCH(kernel, args, like, items, elements): `items` of `elements` each, split over torch's threads
template <typename Args>
void launch(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items, int64_t elements) {
  if (items == 0) return;
  const int64_t grain = grain_rows(elements);
  // a call that one thread does is not worth the way through torch's pool
  if (items <= grain) return kernel(args, 0, items);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}
#define FLEXKERNELS_LAUNCH(kernel, args, like, items, elements) \
  launch(FLEXKERNELS_SELECT(kernel##_kernel), args, items, elements)

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

// NaN in every float type
inline void poison(const Tensor& t) { memset(t.mutable_data_ptr(), 0xff, bytes_of(t)); }

#endif

// new memory, uninitialised, on the device of `like`. FLEXKERNELS_POISON=1 fills it with NaN, so that tests see what no
// kernel wrote. One call of the C shim: torch::stable::new_empty goes through the dispatcher by name.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type) {
  static const bool poisoned = [] {
    const char* set = getenv("FLEXKERNELS_POISON");
    return set && *set && *set != '0';
  }();
  constexpr int64_t kMaxDim = 64;
  STD_TORCH_CHECK(dim <= kMaxDim, "a tensor must have at most ", kMaxDim, " dimensions, got ", dim);
  int64_t strides[kMaxDim], running = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = running;
    running *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device, like.get_device_index(), &made));
  Tensor out(made);
  prefer_huge_pages(out);
  if (poisoned && out.numel() > 0) poison(out);
  return out;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return empty(like, size.begin(), static_cast<int64_t>(size.size()), type);
}

inline Tensor empty_like(const Tensor& like, ScalarType type) {
  return empty(like, like.sizes().data(), like.dim(), type);
}

// a result that does not exist is an empty tensor: an op cannot return none
inline Tensor nothing(const Tensor& like, ScalarType type) { return empty(like, {0}, type); }

}  // namespace flexkernels
