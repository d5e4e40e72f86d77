// How every kernel is queued: one call, one message when it fails.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace flexkernels::cuda {

struct Launch {
  const char* op;  // named in the message of a failure
  dim3 grid, block;
  cudaStream_t stream;
  unsigned shared = 0;   // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks of a cluster, along x
  // programmatic dependent launch: the kernel may start while the one before it ends, so it must call
  // ptx::wait_for_predecessors() before it touches what that one wrote or read. ptx::launch_dependents() comes after
  // that: then only the kernel before it can still be under way when a kernel starts. GPUs before sm_90 do not have it
  bool overlap = false;
  // all blocks run at the same time, or the launch fails
  bool cooperative = false;
};

inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next launch starts clean
  throw std::runtime_error(std::string(op) + " did not launch: " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_launch("a query of the device", cudaGetDevice(&device));
  check_launch("a query of the device", cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// of the current device
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

template <typename T>
struct Same {
  typedef T type;
};

// kernel<<<grid, block>>>(args...)
template <typename... Args>
void launch(const Launch& at, void (*kernel)(Args...), typename Same<Args>::type... args) {
  // what a kernel with up to 16 KB of static shared memory may have without asking
  if (at.shared > 32 * 1024) {
    const int bytes = static_cast<int>(at.shared);
    check_launch(at.op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  if (at.cluster > 8) {
    check_launch(at.op, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared;
  config.stream = at.stream;
  config.attrs = attributes;
  if (at.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = at.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (at.overlap && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (at.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  check_launch(at.op, cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace flexkernels::cuda
