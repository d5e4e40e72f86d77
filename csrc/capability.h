// Which ISA level the CPU kernels run at.
#pragma once

namespace flexkernels {

enum class Capability : int { baseline, avx2, avx512, avx512_bf16 };

// The highest level that this CPU has and this build holds, lowered by FLEXKERNELS_CPU_CAPABILITY; read once.
// Throws std::invalid_argument when that variable names no level.
Capability cpu_capability();

const char* capability_name(Capability level);

}  // namespace flexkernels
