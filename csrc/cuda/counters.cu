// Counters are zeroed once, when their memory is made: every kernel that takes some leaves them zero. Kernels that may
// run at the same time must not share them, and two of one stream never do run at the same time; so each stream of a
// device has its own, and so does each stream of a capture, since a graph is replayed beside anything. They are never
// given back: 4 KiB for a captured graph.
#include "counters.h"

#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"

namespace flexkernels::cuda {
namespace {

// counters of one allocation, and the fewest for one stream
constexpr int64_t kBank = int64_t{1} << 20, kFewest = 1024;

struct Range {
  uint32_t* first = nullptr;
  int64_t size = 0;
};

// Not torch's memory: of a graph's pool nothing may live on after the capture. While streams capture, allocation is
// allowed in the relaxed mode alone, and the fill must be on a stream that waits for none of them.
Range zeroed(int64_t n) {
  Range made{nullptr, n};
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_launch("counters", cudaThreadExchangeStreamCaptureMode(&mode));
  const size_t bytes = n * sizeof(uint32_t);
  cudaStream_t own = nullptr;
  cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&made.first), bytes);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(made.first, 0, bytes, own);
    if (error == cudaSuccess) error = cudaStreamSynchronize(own);
    (void)cudaStreamDestroy(own);
  }
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  check_launch("counters", error);
  return made;
}

Range take(Range& bank, int64_t n) {
  if (bank.size < n) bank = zeroed(n < kBank ? kBank : n);
  const Range taken{bank.first, n};
  bank = {bank.first + n, bank.size - n};
  return taken;
}

}  // namespace

uint32_t* counters(int64_t n, cudaStream_t stream) {
  static std::mutex lock;
  static std::map<int, Range> banks;
  // of a device, a stream and a capture, which is 0 where none is under way
  static std::map<std::tuple<int, cudaStream_t, unsigned long long>, Range> ranges;
  int device = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  check_launch("counters", cudaGetDevice(&device));
  check_launch("counters", cudaStreamGetCaptureInfo(stream, &status, &capture));
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  const std::lock_guard<std::mutex> guard(lock);
  Range& range = ranges[{device, stream, capture}];
  if (range.size < n) {
    int64_t size = kFewest;
    while (size < n) size *= 2;
    range = take(banks[device], size);
  }
  return range.first;
}

}  // namespace flexkernels::cuda
