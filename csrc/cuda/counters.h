// Counts of blocks that have arrived, for kernels whose last block finishes the work.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace flexkernels::cuda {

// n counters on the current device, zero when the kernel queued next on `stream` starts; it must leave them zero
uint32_t* counters(int64_t n, cudaStream_t stream);

}  // namespace flexkernels::cuda
