// The skinny linear op: schema and CPU launch. Outputs are allocated by the caller; an op only fills them.
#include "linear.h"

#include "cpu.h"
#include "launches.h"

namespace flexkernels {

void skinny_linear_cpu(const Tensor& x, const Tensor& weight, OptionalTensor scale, OptionalTensor bias,
                       OptionalTensor residual, bool swiglu, const Tensor& out) {
  const SkinnyLinear args = skinny_linear_args(x, weight, scale, bias, residual, swiglu, out);
  if (args.m > 0) launch(FLEXKERNELS_SELECT(skinny_linear_kernel), args, args.outputs, args.k);
}

}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "skinny_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, bool swiglu, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("skinny_linear", TORCH_BOX(&flexkernels::skinny_linear_cpu));
}
