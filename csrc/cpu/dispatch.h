// From a Dtype at run time to an element type of C++.
#pragma once

#include "../core/dtype.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

// call(T{}) with the element type T of `dtype`
template <typename Call>
inline void with_float(Dtype dtype, Call call) {
  if (dtype == Dtype::f32) call(float{});
  if (dtype == Dtype::bf16) call(bf16{});
  if (dtype == Dtype::f16) call(f16{});
}

}  // namespace
}  // namespace flexkernels::FLEXKERNELS_ISA
