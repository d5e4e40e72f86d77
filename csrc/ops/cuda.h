// How a CUDA op runs: on the tensors' device, queued on torch's current stream.
#pragma once

#include "../cuda/kernels.h"
#include "args.h"

namespace flexkernels {

template <typename Args>
void launch(void (*queue)(const Args&, void*), const Args& args, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  queue(args, stream);
}

}  // namespace flexkernels
