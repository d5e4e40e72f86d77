// FSQ with quantisation dropout and token corruption: random words decide, integers compared with integers.
#pragma once

#include "fsq.h"
#include "sampling.h"

namespace flexkernels {

// an int64 that is given, or read where the device has it
struct FsqCounter {
  const int64_t* at;
  int64_t value;
};

struct FsqTrain {
  FsqQuantize rows;      // codes and ids are both wanted
  const float* bounded;  // CPU: tanh(z + shift) [n, dims] where drop > 0
  const void* sample;    // [n] or null: row i is of sample i / rows_per_sample
  uint8_t* replaced;     // [n] where corrupt > 0: whether a row's id was drawn
  int64_t rows_per_sample;
  // 32 random bits lie below each with its probability: up to 2^32
  uint64_t drop, apply, corrupt, min_corrupt;
  FsqCounter seed, offset;
  bool wide_sample;  // int64, else int32
};

// what the counter's second word says the numbers are for
enum FsqPurpose : uint32_t { kFsqOfSample = 0, kFsqOfToken = 1 };

struct FsqStream {
  PhiloxKey key;
  uint32_t low, high;  // of the offset
};

FLEXKERNELS_HD FsqStream fsq_stream(const FsqTrain& p) {
  const uint64_t offset = static_cast<uint64_t>(p.offset.at ? *p.offset.at : p.offset.value);
  return {philox_key(p.seed.at ? *p.seed.at : p.seed.value), static_cast<uint32_t>(offset),
          static_cast<uint32_t>(offset >> 32)};
}

// four words of the number `index`
FLEXKERNELS_HD void fsq_words(const FsqStream& s, uint64_t index, FsqPurpose purpose, uint32_t (&word)[4]) {
  word[0] = static_cast<uint32_t>(index);
  word[1] = static_cast<uint32_t>(index >> 32) * 2 + purpose;
  word[2] = s.low;
  word[3] = s.high;
  philox(s.key, word);
}

FLEXKERNELS_HD int64_t fsq_sample_of(const FsqTrain& p, int64_t row) {
  if (!p.sample) return row / p.rows_per_sample;
  return p.wide_sample ? static_cast<const int64_t*>(p.sample)[row] : static_cast<const int32_t*>(p.sample)[row];
}

// what is drawn for a sample: whether its codes stay as they are, and the threshold below which a token is replaced
struct FsqSample {
  bool dropped;
  uint64_t replace;
};

FLEXKERNELS_HD FsqSample fsq_sample(const FsqTrain& p, const FsqStream& s, int64_t sample) {
  uint32_t word[4];
  fsq_words(s, static_cast<uint64_t>(sample), kFsqOfSample, word);
  const uint64_t span = ((word[2] >> 1) * (p.corrupt - p.min_corrupt)) >> 31;
  return {word[0] < p.drop, word[1] < p.apply ? p.min_corrupt + span : 0};
}

// 63 random bits of a token's words
FLEXKERNELS_HD uint64_t fsq_drawn(const uint32_t (&word)[4]) {
  return static_cast<uint64_t>(word[1] >> 1) << 32 | word[2];
}

}  // namespace flexkernels
