// Sampling arithmetic that every backend repeats bit for bit: each float operation is rounded by itself (no fused
// multiply-add), masses are 64-bit integers, so that their sums do not depend on an order.
#pragma once

#include "dtype.h"

namespace flexkernels {

struct SampleLogits {
  const void* logits;      // [n, vocab], rows logits_stride apart
  const void* uncond;      // [n, vocab] or null
  const int64_t* seeds;    // [n] or null: seed, and row r takes stream r
  const int64_t* offsets;  // [n] or null: offset
  int64_t* ids;            // [n]
  float* logprob;          // [n] or null
  int64_t n, vocab, logits_stride, uncond_stride;
  int64_t seed, offset;
  int64_t top_k;  // vocab: no filter
  int64_t top_p;  // in units of 2^-30; 0: no filter
  float guidance;
  float scale;      // log2(e) / temperature; 0: argmax
  float log2_minp;  // -inf: no filter
  Dtype dtype;      // of logits and uncond
};

constexpr float kSampleSmallest = -126.0f;  // exponents below weigh nothing
constexpr float kSampleInfinity = __builtin_inff();
constexpr int kSampleMassBits = 40;
constexpr int kSampleTopPBits = 30;
// one Philox block serves the tokens 64 t + 16 j + l, j = 0 .. 3, by its word j; it has the number 16 t + l
constexpr int kSampleTile = 64;

template <typename To, typename From>
FLEXKERNELS_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// products and sums that no compiler contracts
template <typename F>
FLEXKERNELS_HD F rounded_mul(F a, F b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <typename F>
FLEXKERNELS_HD F rounded_add(F a, F b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

template <typename F>
FLEXKERNELS_HD F rounded_div(F a, F b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// x * a + b, rounded twice
template <typename F>
FLEXKERNELS_HD F mul_add(F x, F a, float b) {
  return rounded_add(rounded_mul(x, a), F{} + b);
}

// between float and int32, a number or a vector of them
template <typename To, typename From>
FLEXKERNELS_HD To number_as(From from) {
#ifdef __CUDACC__
  return static_cast<To>(from);
#else
  if constexpr (sizeof(From) == sizeof(float)) {
    return static_cast<To>(from);
  } else {
    return __builtin_convertvector(from, To);
  }
#endif
}

// uncond + guidance * (cond - uncond); -0 becomes 0 and NaN -inf
template <typename F>
FLEXKERNELS_HD F sample_guided(F cond, F uncond, float guidance) {
  const F moved = rounded_mul(F{} + guidance, rounded_add(cond, -uncond));
  return rounded_add(uncond, moved);
}

template <typename F>
FLEXKERNELS_HD F sample_clean(F x) {
  return x == x ? rounded_add(x, F{}) : F{} - kSampleInfinity;
}

// log2 of a token's weight against the largest logit's
template <typename F>
FLEXKERNELS_HD F sample_exponent(F x, float largest, float scale) {
  const F top = F{} + largest;
  return x == top ? F{} : rounded_mul(rounded_add(x, -top), F{} + scale);
}

// 2^y for y <= 0, and 0 below kSampleSmallest; relative error 1.2e-7
template <typename F, typename I>
FLEXKERNELS_HD F sample_weight(F y) {
  const F low = F{} + kSampleSmallest;
  const F at = y > low ? y : low;
  // to the nearest integer, ties to even
  const F whole = rounded_add(rounded_add(at, F{} + 12582912.0f), F{} - 12582912.0f);
  const F f = rounded_add(at, -whole);
  F r = F{} + 1.5353362e-4f;
  r = mul_add(r, f, 1.33988738e-3f);
  r = mul_add(r, f, 9.61843692e-3f);
  r = mul_add(r, f, 5.55033237e-2f);
  r = mul_add(r, f, 2.40226477e-1f);
  r = mul_add(r, f, 6.93147182e-1f);
  r = mul_add(r, f, 1.0f);
  const F power = bits_as<F>((number_as<I>(whole) + 127) << 23);
  return y >= low ? rounded_mul(r, power) : F{};
}

// log(1 + f) for f in [-1/4, 1/2]; relative error 1.5e-7
template <typename F>
FLEXKERNELS_HD F sample_log1p(F f) {
  F q = F{} - 4.50748056e-2f;
  q = mul_add(q, f, 1.04630224e-1f);
  q = mul_add(q, f, -1.31611928e-1f);
  q = mul_add(q, f, 1.44783944e-1f);
  q = mul_add(q, f, -1.66473120e-1f);
  q = mul_add(q, f, 1.99908614e-1f);
  q = mul_add(q, f, -2.50000954e-1f);
  q = mul_add(q, f, 3.33334506e-1f);
  const F square = rounded_mul(f, f);
  const F rest = rounded_add(rounded_mul(rounded_mul(f, square), q), rounded_mul(square, F{} - 0.5f));
  return rounded_add(f, rest);
}

// log(v) for normal v > 0
template <typename F, typename I>
FLEXKERNELS_HD F sample_log(F v) {
  const I bits = bits_as<I>(v);
  const I exponent = (bits - 0x3f400000) >> 23;
  const F f = rounded_add(bits_as<F>(bits - (exponent << 23)), F{} - 1.0f);
  return rounded_add(rounded_mul(number_as<F>(exponent), F{} + 6.93147182e-1f), sample_log1p(f));
}

// u in (0, 1) from 31 random bits
template <typename F, typename I>
FLEXKERNELS_HD F sample_uniform(I bits) {
  return rounded_mul(rounded_add(number_as<F>(bits), F{} + 0.5f), F{} + 0x1p-31f);
}

// -log(1 - u): an exponential variate, with its full relative precision near 0, where the race is won
template <typename F, typename I>
FLEXKERNELS_HD F sample_exponential(I bits) {
  const F u = sample_uniform<F, I>(bits);
  const F near = -sample_log1p(-u);
  const F far = -sample_log<F, I>(sample_uniform<F, I>(0x7fffffff - bits));
  return u <= F{} + 0.25f ? near : far;
}

struct PhiloxKey {
  uint32_t low, high;
};

FLEXKERNELS_HD PhiloxKey philox_key(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

// Philox-4x32-10 (Salmon et al., SC 2011): counter [4] becomes four random words
FLEXKERNELS_HD void philox(PhiloxKey key, uint32_t (&counter)[4]) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * counter[0];
    const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * counter[2];
    counter[0] = static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key.low;
    counter[1] = static_cast<uint32_t>(second);
    counter[2] = static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key.high;
    counter[3] = static_cast<uint32_t>(first);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

// what a row draws with: the counter's words 1 to 3 and the key
struct SampleStream {
  PhiloxKey key;
  uint32_t row, low, high;
};

FLEXKERNELS_HD SampleStream sample_stream(const SampleLogits& p, int64_t row) {
  const uint64_t offset = static_cast<uint64_t>(p.offsets ? p.offsets[row] : p.offset);
  return {philox_key(p.seeds ? p.seeds[row] : p.seed), p.seeds ? 0u : static_cast<uint32_t>(row),
          static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)};
}

// integers in the order of floats, for floats without NaN and -0; its own inverse
FLEXKERNELS_HD int32_t sample_order(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

FLEXKERNELS_HD int32_t order_of_float(float x) { return sample_order(static_cast<int32_t>(bits_of_float(x))); }

FLEXKERNELS_HD float float_of_order(int32_t order) { return float_of_bits(static_cast<uint32_t>(sample_order(order))); }

FLEXKERNELS_HD int64_t sample_mass(float weight) { return static_cast<int64_t>(rounded_mul(weight, 0x1p40f)); }

// floor(total * top_p), at least 1, without overflow for total < 2^60
FLEXKERNELS_HD int64_t sample_needed(int64_t total, int64_t top_p) {
  const int64_t low = total & ((int64_t{1} << kSampleTopPBits) - 1);
  const int64_t needed = (total >> kSampleTopPBits) * top_p + ((low * top_p) >> kSampleTopPBits);
  return needed > 1 ? needed : 1;
}

// log of the probability of a token with exponent y among `total` mass
FLEXKERNELS_HD float sample_logprob(float y, int64_t total) {
  const float sum = rounded_mul(static_cast<float>(total), 0x1p-40f);
  return rounded_add(rounded_mul(y, 6.93147182e-1f), -sample_log<float, int32_t>(sum));
}

}  // namespace flexkernels
