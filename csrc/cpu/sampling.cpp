// Sampling of a row by one thread. It owns the whole row: the guided logits are written once to a scratch buffer that
// every later pass reads. Top-k and top-p each become one threshold on the logit, found by bisection; whenever a step
// has settled a part of the values, the rest moves to a smaller pool, so that all steps together cost about two passes.
// It gives the bits of every other backend because counts and masses are integers, whose sums have no order, and the
// race (the least variate over weight) is decided by values that are each one rounded operation after another.
#include "../core/sampling.h"

#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

// three buffers of `padded` floats: the row, and values and weights still in question
struct Scratch {
  float *x, *values, *weights;
  int64_t padded;
};

// the extremes of the finite (or +inf) values
struct Range {
  vf low = vf{} + kSampleInfinity, high = vf{} - kSampleInfinity;

  ALWAYS_INLINE void add(vf x) {
    high = x > high ? x : high;
    const vf finite = x == vf{} - kSampleInfinity ? vf{} + kSampleInfinity : x;
    low = finite < low ? finite : low;
  }

  float smallest() const {
    float best = low[0];
    for (int lane = 1; lane < W; ++lane) best = low[lane] < best ? low[lane] : best;
    return best;
  }

  float largest() const {
    float best = high[0];
    for (int lane = 1; lane < W; ++lane) best = high[lane] > best ? high[lane] : best;
    return best;
  }
};

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t all = 0;
  for (int lane = 0; lane < W; ++lane) all |= mask[lane];
  return all != 0;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// the lanes that a mask of eight names, in order
struct LaneTable {
  uint8_t lanes[256][8] = {};
  constexpr LaneTable() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, count = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask][count++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
constexpr LaneTable kLaneTable;
#endif

// copies the lanes of v that the mask names to `out`, in order; up to W floats from there may be overwritten
inline int append(float* out, vf v, vi mask) {
#if defined(__AVX512F__)
  const __mmask16 bits = _mm512_movepi32_mask((__m512i)mask);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(bits, (__m512)v));
  return __builtin_popcount(bits);
#elif defined(__AVX2__)
  const int bits = _mm256_movemask_ps((__m256)mask);
  const __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kLaneTable.lanes[bits]));
  _mm256_storeu_ps(out, _mm256_permutevar8x32_ps((__m256)v, from));
  return __builtin_popcount(bits);
#else
  int count = 0;
  for (int lane = 0; lane < W; ++lane) {
    if (mask[lane]) out[count++] = v[lane];
  }
  return count;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// the whole parts of 0 <= x < 2^52, which are the low bits of their sum with 2^52
inline vl whole_parts(__m128 x) {
  const __m256d shift = _mm256_set1_pd(0x1p52);
  const __m256d sum = _mm256_add_pd(_mm256_floor_pd(_mm256_cvtps_pd(x)), shift);
  return (vl)_mm256_xor_pd(sum, shift);
}
#endif

// sums of 64-bit masses of weights
struct MassSum {
  vl low = {}, high = {};

  ALWAYS_INLINE void add(vf weight) {
    const vf scaled = weight * 0x1p40f;
#if defined(__AVX512F__)
    low += (vl)_mm512_maskz_cvttps_epi64(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)scaled, 0));
    const __m256 upper = _mm512_maskz_extractf32x8_ps(0xff, (__m512)scaled, 1);
    high += (vl)_mm512_maskz_cvttps_epi64(0xff, upper);
#elif defined(__AVX2__)
    low += whole_parts(_mm256_castps256_ps128((__m256)scaled));
    high += whole_parts(_mm256_extractf128_ps((__m256)scaled, 1));
#else
    vl part_low, part_high;
    widen<vl, vf_half>(scaled, &part_low, &part_high);
    low += part_low;
    high += part_high;
#endif
  }

  int64_t total() const {
    const vl both = low + high;
    int64_t sum = 0;
    for (int lane = 0; lane < W / 2; ++lane) sum += both[lane];
    return sum;
  }
};

// the guided row into s.x, -inf after its end
template <typename T>
Range load_row(const SampleLogits& p, int64_t row, const Scratch& s) {
  const T* cond = static_cast<const T*>(p.logits) + row * p.logits_stride;
  const T* uncond = p.uncond ? static_cast<const T*>(p.uncond) + row * p.uncond_stride : nullptr;
  const auto guided = [&](int64_t i, auto io) {
    const vf x = io.load_from(cond + i);
    return sample_clean(uncond ? sample_guided(x, io.load_from(uncond + i), p.guidance) : x);
  };
  Range range;
  int64_t i = 0;
  for (; i + W <= p.vocab; i += W) {
    const vf x = guided(i, Full{});
    range.add(x);
    store(s.x + i, x);
  }
  if (i < p.vocab) {
    store(s.x + i, guided(i, Part{static_cast<int>(p.vocab - i)}));
    for (int64_t end = p.vocab; end % W; ++end) s.x[end] = -kSampleInfinity;
    range.add(load(s.x + i));
    i += W;
  }
  for (; i < s.padded; i += W) store(s.x + i, vf{} - kSampleInfinity);
  return range;
}

// a row's constants
struct Weigh {
  float largest, scale;

  ALWAYS_INLINE vf exponent(vf x) const { return sample_exponent(x, largest, scale); }
  ALWAYS_INLINE vf weight(vf x) const { return sample_weight<vf, vi>(exponent(x)); }
};

// what bisection looks at: `count` values (a multiple of W, padded with -inf), and their weights where masses count
struct Pool {
  const float *values, *weights;
  int64_t count;
};

// how much the values >= pivot amount to: their number, or their mass
template <bool kMass>
int64_t amount_from(const Pool& pool, float pivot) {
  vi number = {};
  MassSum mass;
  for (int64_t i = 0; i < pool.count; i += W) {
    const vi above = load(pool.values + i) >= pivot;
    if constexpr (kMass)
      mass.add(above ? load(pool.weights + i) : vf{});
    else
      number -= above;
  }
  if constexpr (kMass) return mass.total();
  int64_t sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += number[lane];
  return sum;
}

// keeps the values from low to high, in s
template <bool kMass>
Pool narrow(const Pool& pool, float low, float high, const Scratch& s) {
  int64_t count = 0;
  for (int64_t i = 0; i < pool.count; i += W) {
    const vf x = load(pool.values + i);
    const vi inside = (x >= low) & (x <= high);
    if constexpr (kMass) {
      const vf weight = load(pool.weights + i);
      append(s.weights + count, weight, inside);
    }
    count += append(s.values + count, x, inside);
  }
  const int64_t end = (count + W - 1) / W * W;
  for (int64_t i = count; i < end; ++i) s.values[i] = -kSampleInfinity;
  if constexpr (kMass) {
    for (int64_t i = count; i < end; ++i) s.weights[i] = 0;
  }
  return {s.values, s.weights, end};
}

// The largest float v for which the finite values >= v amount to at least `needed`; the smallest value if none is.
// Bisection takes turns between the middle of the floats and of their order, which copes with outliers.
template <bool kMass>
float threshold(Pool pool, float smallest, float largest, int64_t needed, const Scratch& s) {
  // invariant: from `low` the amount is enough (or low is the smallest), from `high` it is not
  int32_t low = order_of_float(smallest), high = order_of_float(largest) + 1;
  for (bool by_value = true; static_cast<int64_t>(high) - low > 1; by_value = !by_value) {
    int32_t middle = static_cast<int32_t>((static_cast<int64_t>(low) + high) >> 1);
    if (by_value && pool.count > 4 * W) {
      const int32_t mean = order_of_float(0.5f * float_of_order(low) + 0.5f * float_of_order(high - 1));
      if (mean > low && mean < high) middle = mean;
    }
    const int64_t amount = amount_from<kMass>(pool, float_of_order(middle));
    // no value is -0, whose order is -1, but to 0 it compares as equal: it is not below the zeros
    if (amount >= needed)
      low = middle;
    else
      high = middle == 0 ? -1 : middle;
    if (pool.count <= 4 * W) continue;
    // what is above `high` stays counted
    if (amount < needed) needed -= amount;
    pool = narrow<kMass>(pool, float_of_order(low), float_of_order(high - 1), s);
  }
  return float_of_order(low);
}

// a pool of the values >= low with their weights, in s; the mass of them all in `total`
Pool weighted_pool(const Weigh& weigh, float low, const Scratch& s, int64_t* total) {
  int64_t count = 0;
  MassSum mass;
  for (int64_t i = 0; i < s.padded; i += W) {
    const vf x = load(s.x + i);
    const vi kept = x >= low;
    if (!any(kept)) continue;
    const vf weight = kept ? weigh.weight(x) : vf{};
    mass.add(weight);
    append(s.weights + count, weight, kept);
    count += append(s.values + count, x, kept);
  }
  for (; count % W; ++count) {
    s.values[count] = -kSampleInfinity;
    s.weights[count] = 0;
  }
  *total = mass.total();
  return {s.values, s.weights, count};
}

// tokens are kept from this logit on, all that have it
float kept_from(const SampleLogits& p, const Weigh& weigh, float smallest, const Scratch& s) {
  float low = smallest;
  if (p.top_k < p.vocab) low = threshold<false>({s.x, nullptr, s.padded}, low, weigh.largest, p.top_k, s);
  if (p.top_p) {
    int64_t total = 0;
    const Pool pool = weighted_pool(weigh, low, s, &total);
    low = threshold<true>(pool, low, weigh.largest, sample_needed(total, p.top_p), s);
  }
  return low;
}

typedef uint64_t vw __attribute__((vector_size(4 * W)));

// products of the even 32-bit lanes
ALWAYS_INLINE vw multiply_even(vw a, uint32_t b) {
#if defined(__AVX512F__)
  return (vw)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vw)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

ALWAYS_INLINE void multiply_wide(vu a, uint32_t b, vu* high, vu* low) {
  const vw even = multiply_even((vw)a, b), odd = multiply_even((vw)a >> 32, b);
  *low = (vu)((even & 0xffffffffu) | (odd << 32));
  *high = (vu)((even >> 32) | (odd & ~uint64_t{0xffffffffu}));
}

// philox() for W blocks from `block` on
ALWAYS_INLINE void random_words(const SampleStream& stream, uint32_t block, vu (&word)[4]) {
  PhiloxKey key = stream.key;
  vu lanes = {};
  for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
  word[0] = lanes + block;
  word[1] = vu{} + stream.row;
  word[2] = vu{} + stream.low;
  word[3] = vu{} + stream.high;
  for (int round = 0; round < 10; ++round) {
    vu first_high, first_low, second_high, second_low;
    multiply_wide(word[0], 0xD2511F53u, &first_high, &first_low);
    multiply_wide(word[2], 0xCD9E8D57u, &second_high, &second_low);
    word[0] = second_high ^ word[1] ^ key.low;
    word[1] = second_low;
    word[2] = first_high ^ word[3] ^ key.high;
    word[3] = first_low;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

// the token with the least exponential variate over weight
struct Race {
  float best = kSampleInfinity;
  int64_t id = -1;

  // the variate is at least u, which spares most vectors the logarithm
  ALWAYS_INLINE void add(int64_t i, vf weight, vu word) {
    const vi bits = (vi)(word >> 1);
    if (!any(sample_uniform<vf, vi>(bits) <= 1.001f * (best * weight))) return;
    const vf time = sample_exponential<vf, vi>(bits) / weight;
    for (int lane = 0; lane < W; ++lane) {
      if (weight[lane] > 0 && (time[lane] < best || (time[lane] == best && i + lane < id))) {
        best = time[lane];
        id = i + lane;
      }
    }
  }
};

inline bool tile_above(const float* x, float low) {
  vi found = {};
  for (int i = 0; i < kSampleTile; i += W) found |= load(x + i) >= low;
  return any(found);
}

template <bool kLogprob>
void draw(const SampleLogits& p, int64_t row, const Weigh& weigh, float low, const Scratch& s) {
  const SampleStream stream = sample_stream(p, row);
  Race race;
  MassSum mass;
  for (int64_t tile = 0; tile < s.padded; tile += kSampleTile) {
    if (!tile_above(s.x + tile, low)) continue;
    for (int part = 0; part < 16; part += W) {
      vu word[4];
      random_words(stream, static_cast<uint32_t>(tile / 4 + part), word);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t i = tile + 16 * j + part;
        const vf x = load(s.x + i), y = weigh.exponent(x);
        const vf weight = (x >= low) & (y >= p.log2_minp) ? sample_weight<vf, vi>(y) : vf{};
        if (kLogprob) mass.add(weight);
        race.add(i, weight, word[j]);
      }
    }
  }
  p.ids[row] = race.id;
  if (!kLogprob) return;
  const float y = sample_exponent(s.x[race.id], weigh.largest, weigh.scale);
  p.logprob[row] = sample_logprob(y, mass.total());
}

int64_t first_of(const Scratch& s, float value) {
  for (int64_t i = 0; i < s.padded; i += W) {
    const vi found = load(s.x + i) == value;
    if (!any(found)) continue;
    for (int lane = 0; lane < W; ++lane) {
      if (found[lane]) return i + lane;
    }
  }
  return 0;
}

template <typename T>
void sample_row(const SampleLogits& p, int64_t row, const Scratch& s) {
  const Range range = load_row<T>(p, row, s);
  const Weigh weigh{range.largest(), p.scale};
  if (weigh.largest == -kSampleInfinity || p.scale == 0) {
    p.ids[row] = first_of(s, weigh.largest);
    if (p.logprob) p.logprob[row] = weigh.largest == -kSampleInfinity ? __builtin_nanf("") : 0.0f;
    return;
  }
  const float low = kept_from(p, weigh, range.smallest(), s);
  if (p.logprob)
    draw<true>(p, row, weigh, low, s);
  else
    draw<false>(p, row, weigh, low, s);
}

}  // namespace

void sample_logits_kernel(const SampleLogits& p, int64_t begin, int64_t end) {
  const int64_t padded = (p.vocab + kSampleTile - 1) / kSampleTile * kSampleTile;
  // a compressed store writes a whole vector
  const int64_t room = padded + W;
  float* memory = new float[3 * room];
  const Scratch s{memory, memory + room, memory + 2 * room, padded};
  for (int64_t row = begin; row < end; ++row) {
    if (p.dtype == Dtype::f32) sample_row<float>(p, row, s);
    if (p.dtype == Dtype::bf16) sample_row<bf16>(p, row, s);
    if (p.dtype == Dtype::f16) sample_row<f16>(p, row, s);
  }
  delete[] memory;
}

}  // namespace flexkernels::FLEXKERNELS_ISA
