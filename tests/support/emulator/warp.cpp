// What the lanes of a warp do together: the last of them to arrive computes the results of all.
#include <math.h>
#include <string.h>

#include "runtime.h"

#define CALLER __builtin_return_address(0)

namespace emu {
namespace {

constexpr unsigned kAll = 0xffffffffu;

template <typename T>
T& of(const Meeting& m, unsigned lane) {
  return *static_cast<T*>(m.payload[lane]);
}

template <typename Body>
void each_lane(const Meeting& m, Body body) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (m.arrived >> lane & 1) body(lane);
  }
}

struct Shuffle {
  uint64_t value, result;
  unsigned source;
};
struct Word {
  uint64_t value;
  unsigned result;
  int flag;
};

// all 32 lanes must be there
void check_full(const Meeting& m) {
  if (m.arrived != kAll) fail(m.at[__builtin_ctz(m.arrived)], "calls %s in a warp of which lanes have returned", m.what);
}

float half_to_float(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  float f;
  if (exponent == 31)
    f = mantissa ? NAN : INFINITY;
  else
    f = exponent ? ldexpf(static_cast<float>(mantissa | 1024), static_cast<int>(exponent) - 25)
                 : ldexpf(static_cast<float>(mantissa), -24);
  return sign ? -f : f;
}

float brain_to_float(uint32_t b) {
  const uint32_t bits = b << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

struct Mma {
  Fragment c;
  uint32_t ab[6];
  bool half;
};

// element (row, k) of a, and (k, column) of b
float a_of(const Meeting& m, int row, int k) {
  const Mma& lane = of<Mma>(m, row % 8 * 4 + k % 8 / 2);
  const uint32_t word = lane.ab[k / 8 * 2 + row / 8] >> 16 * (k % 2) & 0xffff;
  return lane.half ? half_to_float(word) : brain_to_float(word);
}
float b_of(const Meeting& m, int k, int column) {
  const Mma& lane = of<Mma>(m, column * 4 + k % 8 / 2);
  const uint32_t word = lane.ab[4 + k / 8] >> 16 * (k % 2) & 0xffff;
  return lane.half ? half_to_float(word) : brain_to_float(word);
}

void finish_mma(Meeting& m) {
  check_full(m);
  float a[16][16], b[16][8];
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16; ++row) a[row][k] = a_of(m, row, k);
    for (int column = 0; column < 8; ++column) b[k][column] = b_of(m, k, column);
  }
  each_lane(m, [&](unsigned lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = static_cast<int>(lane) / 4 + i / 2 * 8, column = static_cast<int>(lane) % 4 * 2 + i % 2;
      double sum = of<Mma>(m, lane).c.c[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      of<Mma>(m, lane).c.c[i] = static_cast<float>(sum);
    }
  });
}

// matrices of 8 x 8 elements of 16 bits, element (row, column) in lane row * 4 + column / 2
struct Matrices {
  uint32_t words[4];
  const void* row;
  int count;
  bool transposed;
};

void transpose(Meeting& m, int which) {
  uint16_t full[8][8];
  for (unsigned lane = 0; lane < 32; ++lane) memcpy(&full[lane / 4][lane % 4 * 2], &of<Matrices>(m, lane).words[which], 4);
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned row = lane / 4, column = lane % 4 * 2;
    of<Matrices>(m, lane).words[which] = full[column][row] | static_cast<uint32_t>(full[column + 1][row]) << 16;
  }
}

void finish_movmatrix(Meeting& m) {
  check_full(m);
  transpose(m, 0);
}

void finish_ldmatrix(Meeting& m) {
  check_full(m);
  const Matrices first = of<Matrices>(m, 0);
  for (int which = 0; which < first.count; ++which) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      const char* row = static_cast<const char*>(of<Matrices>(m, 8 * which + lane / 4).row);
      memcpy(&of<Matrices>(m, lane).words[which], row + lane % 4 * 4, 4);
    }
    if (first.transposed) transpose(m, which);
  }
}

}  // namespace

void sync_warp(unsigned mask) {
  meet("__syncwarp()", mask, self, [](Meeting& m) {
    std::vector<Share> shares;
    each_lane(m, [&](unsigned lane) { shares.push_back(share(of<Thread>(m, lane))); });
    const KnownPtr known = join(shares);
    each_lane(m, [&](unsigned lane) { learn(of<Thread>(m, lane), known); });
  }, CALLER);
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source) {
  Shuffle mine{value, 0, source};
  meet("a shuffle", mask, &mine, [](Meeting& m) {
    each_lane(m, [&](unsigned lane) {
      Shuffle& s = of<Shuffle>(m, lane);
      if (!(m.arrived >> s.source & 1)) {
        fail(m.at[lane], "(lane %u) shuffles from lane %u, which has returned or is not in the mask 0x%08x", lane, s.source,
             m.mask);
      }
      s.result = of<Shuffle>(m, s.source).value;
    });
  }, CALLER);
  return mine.result;
}

unsigned ballot(unsigned mask, bool predicate) {
  Word mine{predicate, 0, 0};
  meet("a vote", mask, &mine, [](Meeting& m) {
    unsigned votes = 0;
    each_lane(m, [&](unsigned lane) { votes |= static_cast<unsigned>(of<Word>(m, lane).value) << lane; });
    each_lane(m, [&](unsigned lane) { of<Word>(m, lane).result = votes; });
  }, CALLER);
  return mine.result;
}

unsigned match(unsigned mask, uint64_t value, bool all, int* equal) {
  Word mine{value, 0, 0};
  meet(all ? "__match_all_sync" : "__match_any_sync", mask, &mine, [](Meeting& m) {
    each_lane(m, [&](unsigned lane) {
      Word& word = of<Word>(m, lane);
      each_lane(m, [&](unsigned other) { word.result |= (of<Word>(m, other).value == word.value) << other; });
    });
  }, CALLER);
  if (!all) return mine.result;
  *equal = mine.result == mask;
  return *equal ? mask : 0;
}

unsigned reduce(unsigned mask, unsigned value, Reduction what) {
  Word mine{value, 0, static_cast<int>(what)};
  meet("a reduction", mask, &mine, [](Meeting& m) {
    const unsigned first = __builtin_ctz(m.arrived);
    unsigned total = of<Word>(m, first).value;
    each_lane(m, [&](unsigned lane) {
      if (lane == first) return;
      const unsigned x = of<Word>(m, lane).value;
      const int a = static_cast<int>(total), b = static_cast<int>(x);
      switch (of<Word>(m, first).flag) {
        case kAdd: total += x; break;
        case kMin: total = x < total ? x : total; break;
        case kMax: total = x > total ? x : total; break;
        case kMinSigned: total = b < a ? x : total; break;
        case kMaxSigned: total = b > a ? x : total; break;
        case kBitAnd: total &= x; break;
        case kBitOr: total |= x; break;
        default: total ^= x;
      }
    });
    each_lane(m, [&](unsigned lane) { of<Word>(m, lane).result = total; });
  }, CALLER);
  return mine.result;
}

Fragment mma(Fragment c, const uint32_t (&ab)[6], bool half) {
  Mma mine{c, {}, half};
  memcpy(mine.ab, ab, sizeof mine.ab);
  meet(half ? "mma of float16" : "mma of bfloat16", kAll, &mine, finish_mma, CALLER);
  return mine.c;
}

uint32_t movmatrix(uint32_t m) {
  Matrices mine{{m}, nullptr, 1, true};
  meet("movmatrix", kAll, &mine, finish_movmatrix, CALLER);
  return mine.words[0];
}

void ldmatrix(uint32_t* m, int count, const void* row, bool transposed) {
  // lanes beyond the matrices give addresses that nobody looks at
  if (self->number % 32 < 8u * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail(CALLER, "ldmatrix takes rows on 16 bytes, got %p", row);
    access(row, 16, kRead, CALLER);
  }
  Matrices mine{{}, row, count, transposed};
  meet("ldmatrix", kAll, &mine, finish_ldmatrix, CALLER);
  memcpy(m, mine.words, 4 * count);
}

}  // namespace emu
