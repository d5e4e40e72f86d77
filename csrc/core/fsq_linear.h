// FSQ next to its linear layers: LN and projection before the thresholds, projection and tables behind the ids.
#pragma once

#include "fsq.h"

namespace flexkernels {

// z = weight (hidden - mean) / sqrt(var + eps) + bias, then ids and codes of z
struct FsqProject {
  const void* hidden;       // [n, width]
  const float* weight;      // [dims, width]
  const float* bias;        // [dims] or null
  const float* thresholds;  // [dims, steps], ascending, padded with +inf
  void* codes;              // [n, dims] or null
  void* ids;                // [n] or null
  int64_t n, width;
  int64_t basis[kFsqMaxDims];  // 1, L0, L0*L1, ...
  int dims, steps;
  int half[kFsqMaxDims];  // L // 2
  float eps;
  Dtype dtype;  // of hidden and codes
  IdType id_type;
};

// weight codes(id) + bias + positions[position_index], or tokens[token_index] where that is not negative
struct FsqEmbed {
  const void* ids;                // [n]
  const float* weight;            // [dims, width]
  const float* bias;              // [width] or null
  const void* positions;          // [.., width] or null
  const int32_t* position_index;  // [n], or null: row i takes position i
  const void* tokens;             // [.., width] or null
  const int32_t* token_index;     // [n] or null
  void* out;                      // [n, width]
  int64_t n, width;
  int64_t codebook;  // product of the levels
  int dims;
  int levels[kFsqMaxDims];
  Dtype dtype;  // of positions, tokens and out
  IdType id_type;
};

// the codes of row `row`; an id outside the codebook gives those of some id inside
FLEXKERNELS_HD void fsq_codes_of(const FsqEmbed& p, int64_t row, float* codes) {
  uint64_t id = fsq_load_id(p.ids, p.id_type, row);
  const uint64_t codebook = static_cast<uint64_t>(p.codebook);
  if (id >= codebook) id %= codebook;
  for (int d = 0; d < p.dims; ++d) {
    const uint64_t level = static_cast<uint64_t>(p.levels[d]), rest = id / level;
    codes[d] = fsq_code(static_cast<int>(id - rest * level), p.levels[d] / 2);
    id = rest;
  }
}

}  // namespace flexkernels
