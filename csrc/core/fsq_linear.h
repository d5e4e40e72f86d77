// FSQ next to its linear layers: LN and projection before the thresholds, projection and tables behind the ids.
#pragma once

#include "fsq.h"

namespace flexkernels {

// z = weight (hidden - mean) / sqrt(var + eps) + bias, then ids and codes of z
struct FsqProject {
  const void* hidden;       // [n, width]
  const void* weight;       // [dims, width] of weight_dtype; float32 on the CPU
  const void* bias;         // [dims] like weight, or null
  const float* thresholds;  // [dims, steps], ascending, padded with +inf
  void* codes;              // [n, dims] or null
  void* ids;                // [n] or null
  int64_t n, width;
  int64_t basis[kFsqMaxDims];  // 1, L0, L0*L1, ...
  int dims, steps;
  int levels[kFsqMaxDims];
  float eps;
  Dtype dtype;  // of hidden and codes
  Dtype weight_dtype;
  IdType id_type;
};

// weight codes(id) + bias + positions[position_index], or tokens[token_index] where that is not negative
struct FsqEmbed {
  const void* ids;                // [n]
  const void* weight;             // [width, dims] of dtype; on the CPU [dims, width] float32
  const void* bias;               // [width] of dtype or null; float32 on the CPU
  const void* positions;          // [position_rows, width] or null
  const int32_t* position_index;  // [n], or null: row i takes position i
  const void* tokens;             // [.., width] or null
  const int32_t* token_index;     // [n] or null
  void* out;                      // [n, width]
  int64_t n, width;
  int64_t position_rows;  // of positions
  int64_t codebook;       // product of the levels
  int64_t basis[kFsqMaxDims];
  int dims;
  int levels[kFsqMaxDims];
  Dtype dtype;  // of positions, tokens and out
  IdType id_type;
};

}  // namespace flexkernels
