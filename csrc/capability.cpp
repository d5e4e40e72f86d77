#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace flexkernels {
namespace {

Capability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::avx512_bf16;
  if (avx2 && avx512) return Capability::avx512;
  if (avx2) return Capability::avx2;
#endif
  return Capability::baseline;
}

Capability requested(Capability highest) {
  const char* name = std::getenv("FLEXKERNELS_CPU_CAPABILITY");
  if (!name || !*name) return highest;
  for (const Capability level : {Capability::baseline, Capability::avx2, Capability::avx512, Capability::avx512_bf16}) {
    if (std::string(name) == capability_name(level)) return level < highest ? level : highest;
  }
  throw std::invalid_argument("FLEXKERNELS_CPU_CAPABILITY must be baseline, avx2, avx512 or avx512_bf16, got '" +
                              std::string(name) + "'");
}

}  // namespace

Capability cpu_capability() {
  static const Capability level = requested(detect());
  return level;
}

const char* capability_name(Capability level) {
  switch (level) {
    case Capability::avx512_bf16:
      return "avx512_bf16";
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace flexkernels
