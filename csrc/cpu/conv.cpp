// Convolutions as products of small matrices. A thread takes a block of tiles, transforms their inputs once, and for
// each 16 output channels multiplies, transforms back, and writes: nothing between input and output reaches memory.
#include "../core/conv.h"

#include "kernels.h"
#include "lanes.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

constexpr int kGroups = kConvPanel / W;
// rows of a product whose sums stay in registers
constexpr int kRows = W == 16 ? 12 : W == 8 ? 6 : 2;

// m [R, 16] = v [R, depth] u [depth, 16]
template <int R>
ALWAYS_INLINE void multiply(const float* v, const float* u, int64_t depth, float* m) {
  vf sum[R][kGroups] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vf b[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) b[g] = load(u + k * kConvPanel + g * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vf a = splat(v[r * depth + k]);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) sum[r][g] = fma(a, b[g], sum[r][g]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < kGroups; ++g) store(m + r * kConvPanel + g * W, sum[r][g]);
  }
}

void multiply_all(const float* v, const float* u, int64_t rows, int64_t depth, float* m) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) multiply<kRows>(v + r * depth, u, depth, m + r * kConvPanel);
  for (; r < rows; ++r) multiply<1>(v + r * depth, u, depth, m + r * kConvPanel);
}

// Transforms of one axis: kIn inputs to kUsed products to kOut outputs. `into` are the coefficients of the polynomials
// that vanish at all points but one; the weights are divided by what that one gives (flexkernels/conv.py).
// points 0, 1, -1, 1/2, -2, infinity
struct Four {
  static constexpr int kIn = 6, kUsed = 6, kOut = 4;
  static constexpr float into[kUsed][kIn] = {{1, -1.5f, -2, 1.5f, 1, 0}, {0, -1, 0.5f, 2.5f, 1, 0},
                                             {0, 1, -2.5f, 0.5f, 1, 0},  {0, -2, -1, 2, 1, 0},
                                             {0, 0.5f, -1, -0.5f, 1, 0}, {0, 1, -1.5f, -2, 1.5f, 1}};
  static constexpr float back[kOut][kUsed] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 0.5f, -2, 0}, {0, 1, 1, 0.25f, 4, 0}, {0, 1, -1, 0.125f, -8, 1}};
};

// points 0, 1, -1, infinity; of repeated pixels, a, b, b, c, the product at -1 is zero
struct Two {
  static constexpr int kIn = 4, kUsed = 3, kOut = 2;
  static constexpr float into[kUsed][kIn] = {{-1, 0, 1, 0}, {0, 1, 1, 0}, {0, -1, 0, 1}};
  static constexpr float back[kOut][kUsed] = {{1, 1, 0}, {0, 1, 1}};
};

// sum of coefficients[i] * in[i * stride]
template <int N>
ALWAYS_INLINE vf combine(const float (&coefficients)[N], const vf* in, int stride) {
  vf sum = {};
  bool first = true;
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    const float c = coefficients[i];
    if (c == 0) continue;
    const vf x = in[i * stride];
    if (first)
      sum = c == 1 ? x : c * x;
    else
      sum = c == 1 ? sum + x : c == -1 ? sum - x : fma(x, vf{} + c, sum);
    first = false;
  }
  return sum;
}

struct Place {
  int64_t clip, t, y, x;
};

Place place_of(const CausalConv& p, int64_t tile) {
  const int64_t x = tile % p.tiles_x, y = tile / p.tiles_x % p.tiles_y, row = tile / p.tiles_x / p.tiles_y;
  return {row / p.tiles_t, row % p.tiles_t, y, x};
}

// the channels of a pixel of x, of the past before it, or zeros
ALWAYS_INLINE const float* pixel(const CausalConv& p, const float* zeros, int64_t clip, int64_t t, int64_t y,
                                 int64_t x) {
  if (y < 0 || y >= p.height || x < 0 || x >= p.width || t >= p.frames) return zeros;
  if (t >= 0) return p.x + (((clip * p.frames + t) * p.height + y) * p.width + x) * p.channels;
  if (!p.past || t < -p.past_frames) return zeros;
  return p.past + (((clip * p.past_frames + p.past_frames + t) * p.height + y) * p.width + x) * p.channels;
}

// body(c, io) over the channels
template <typename Body>
ALWAYS_INLINE void for_channels(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + W <= channels; c += W) body(c, Full{});
  if (c < channels) body(c, Part{static_cast<int>(channels - c)});
}

// v[k, row] for one tile: v [alphas, rows, depth]
struct Direct {
  static constexpr int kProducts = 1, kFrames = 1, kSide = 1;
  static void gather(const CausalConv& p, const float* zeros, Place at, float* v, int64_t) {
    const int64_t t0 = at.t * p.time_stride - (p.kt - p.time_stride);
    // with a stride the far side alone is padded
    const int64_t y0 = at.y * p.stride - (p.stride == 1) * (p.kh / 2);
    const int64_t x0 = at.x * p.stride - (p.stride == 1) * (p.kw / 2);
    for (int t = 0; t < p.kt; ++t) {
      for (int y = 0; y < p.kh; ++y) {
        for (int x = 0; x < p.kw; ++x) {
          const float* from = pixel(p, zeros, at.clip, t0 + t, y0 + y, x0 + x);
          memcpy(v, from, p.channels * sizeof(float));
          v += p.channels;
        }
      }
    }
  }
  static ALWAYS_INLINE void scatter(const float* m, int64_t, vf (&y)[1]) { y[0] = load(m); }
};

// 3 x 3 in space by the transform T of both axes; frames are summed
template <typename T, int kRepeat>
struct Space {
  static constexpr int kProducts = T::kUsed * T::kUsed, kFrames = 1, kSide = T::kOut;
  static void gather(const CausalConv& p, const float* zeros, Place at, float* v, int64_t next) {
    for (int t = 0; t < p.kt; ++t, v += p.channels) {
      const float* from[T::kIn * T::kIn];
      for (int i = 0; i < T::kIn; ++i) {
        // an arithmetic shift: -1 stays outside
        const int64_t y = (at.y * T::kOut - 1 + i) >> (kRepeat - 1);
        for (int j = 0; j < T::kIn; ++j) {
          const int64_t x = (at.x * T::kOut - 1 + j) >> (kRepeat - 1);
          from[i * T::kIn + j] = pixel(p, zeros, at.clip, at.t * p.time_stride - (p.kt - p.time_stride) + t, y, x);
        }
      }
      for_channels(p.channels, [&](int64_t c, auto io) __attribute__((always_inline)) {
        vf half[T::kIn * T::kUsed];
#pragma GCC unroll 6
        for (int i = 0; i < T::kIn; ++i) {
          vf in[T::kIn];
#pragma GCC unroll 6
          for (int j = 0; j < T::kIn; ++j) in[j] = io.load_from(from[i * T::kIn + j] + c);
#pragma GCC unroll 6
          for (int j = 0; j < T::kUsed; ++j) half[i * T::kUsed + j] = combine(T::into[j], in, 1);
        }
#pragma GCC unroll 6
        for (int j = 0; j < T::kUsed; ++j) {
#pragma GCC unroll 6
          for (int i = 0; i < T::kUsed; ++i) {
            io.store_to(v + (i * T::kUsed + j) * next + c, combine(T::into[i], half + j, T::kUsed));
          }
        }
      });
    }
  }
  // y [kOut, kOut] from the products at m, `next` apart
  static ALWAYS_INLINE void scatter(const float* m, int64_t next, vf (&y)[kSide * kSide]) {
    vf half[T::kUsed * T::kOut];
#pragma GCC unroll 6
    for (int i = 0; i < T::kUsed; ++i) {
      vf in[T::kUsed];
#pragma GCC unroll 6
      for (int j = 0; j < T::kUsed; ++j) in[j] = load(m + (i * T::kUsed + j) * next);
#pragma GCC unroll 6
      for (int j = 0; j < T::kOut; ++j) half[i * T::kOut + j] = combine(T::back[j], in, 1);
    }
#pragma GCC unroll 6
    for (int i = 0; i < T::kOut; ++i) {
#pragma GCC unroll 6
      for (int j = 0; j < T::kOut; ++j) y[i * T::kOut + j] = combine(T::back[i], half + j, T::kOut);
    }
  }
};

// 3 in time, stride 1
struct Time {
  static constexpr int kProducts = Four::kUsed, kFrames = Four::kOut, kSide = 1;
  static void gather(const CausalConv& p, const float* zeros, Place at, float* v, int64_t next) {
    const float* from[Four::kIn];
    for (int i = 0; i < Four::kIn; ++i) from[i] = pixel(p, zeros, at.clip, at.t * Four::kOut - 2 + i, at.y, at.x);
    for_channels(p.channels, [&](int64_t c, auto io) __attribute__((always_inline)) {
      vf in[Four::kIn];
#pragma GCC unroll 6
      for (int i = 0; i < Four::kIn; ++i) in[i] = io.load_from(from[i] + c);
#pragma GCC unroll 6
      for (int j = 0; j < Four::kUsed; ++j) io.store_to(v + j * next + c, combine(Four::into[j], in, 1));
    });
  }
  static ALWAYS_INLINE void scatter(const float* m, int64_t next, vf (&y)[kFrames]) {
    vf in[Four::kUsed];
#pragma GCC unroll 6
    for (int j = 0; j < Four::kUsed; ++j) in[j] = load(m + j * next);
#pragma GCC unroll 6
    for (int i = 0; i < Four::kOut; ++i) y[i] = combine(Four::back[i], in, 1);
  }
};

// the outputs of one tile and one panel, from its products m
template <typename Kind>
ALWAYS_INLINE void write(const CausalConv& p, Place at, int panel, const float* m, int64_t next) {
  constexpr int kSide = Kind::kSide, kFrames = Kind::kFrames;
  const int per_phase = p.panels / p.phases, phase = panel / per_phase;
  const int64_t channel = int64_t{kConvPanel} * (panel % per_phase);
  for (int g = 0; g < kGroups; ++g) {
    const int64_t c = channel + g * W, left = p.outputs - c;
    if (left <= 0) return;
    vf y[kFrames * kSide * kSide];
    Kind::scatter(m + g * W, next, y);
    const auto put = [&](auto io) __attribute__((always_inline)) {
      const vf bias = p.bias ? io.load_from(p.bias + phase * p.outputs + c) : vf{};
      for (int f = 0; f < kFrames; ++f) {
        const int64_t t = at.t * kFrames + f;
        if (t >= p.steps) return;
        const int64_t frame = (at.clip * p.steps + t) * p.phases + phase;
        for (int i = 0; i < kSide && at.y * kSide + i < p.out_height; ++i) {
          const int64_t row = frame * p.out_height + at.y * kSide + i;
          for (int j = 0; j < kSide && at.x * kSide + j < p.out_width; ++j) {
            const int64_t to = (row * p.out_width + at.x * kSide + j) * p.outputs + c;
            vf value = y[(f * kSide + i) * kSide + j] + bias;
            if (p.residual) value += io.load_from(p.residual + to);
            io.store_to(p.out + to, value);
          }
        }
      }
    };
    left >= W ? put(Full{}) : put(Part{static_cast<int>(left)});
  }
}

template <typename Kind>
void convolve(const CausalConv& args, int64_t begin, int64_t end) {
  const CausalConv p = args;
  const int64_t next = p.block * p.depth;
  float* v = new float[Kind::kProducts * (next + p.block * kConvPanel) + p.channels]();
  float* m = v + Kind::kProducts * next;
  const float* zeros = m + Kind::kProducts * p.block * kConvPanel;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * p.block, left = p.tiles - first, rows = left < p.block ? left : p.block;
    for (int64_t r = 0; r < rows; ++r) Kind::gather(p, zeros, place_of(p, first + r), v + r * p.depth, next);
    for (int panel = 0; panel < p.panels; ++panel) {
      const float* u = p.weight + int64_t{panel} * Kind::kProducts * p.depth * kConvPanel;
      for (int k = 0; k < Kind::kProducts; ++k) {
        multiply_all(v + k * next, u + k * p.depth * kConvPanel, rows, p.depth, m + k * p.block * kConvPanel);
      }
      for (int64_t r = 0; r < rows; ++r) {
        write<Kind>(p, place_of(p, first + r), panel, m + r * kConvPanel, p.block * kConvPanel);
      }
    }
  }
  delete[] v;
}

}  // namespace

void causal_conv_kernel(const CausalConv& p, int64_t begin, int64_t end) {
  switch (p.kind) {
    case ConvKind::direct:
      return convolve<Direct>(p, begin, end);
    case ConvKind::space:
      return convolve<Space<Four, 1>>(p, begin, end);
    case ConvKind::upsample:
      return convolve<Space<Two, 2>>(p, begin, end);
    case ConvKind::time:
      return convolve<Time>(p, begin, end);
  }
}

}  // namespace flexkernels::FLEXKERNELS_ISA
