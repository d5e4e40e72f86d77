// FSQ as it is trained: rows are quantised as fsq.cpp does it, then those that chance picks are written anew.
#include "../core/fsq_train.h"

#include "dispatch.h"
#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

// tokens whose random words are made together, a word an array, so that the compiler makes vectors of them
constexpr int kTokens = 64;

struct Words {
  uint32_t chance[kTokens];
  uint64_t drawn[kTokens];
};

void words_of_tokens(const FsqStream& s, int64_t row, Words& words) {
  for (int i = 0; i < kTokens; ++i) {
    uint32_t word[4];
    fsq_words(s, static_cast<uint64_t>(row + i), kFsqOfToken, word);
    words.chance[i] = word[0];
    words.drawn[i] = fsq_drawn(word);
  }
}

template <typename T>
void write_unrounded(const FsqTrain& p, int64_t row) {
  const FsqQuantize& q = p.rows;
  for (int d = 0; d < q.dims; ++d) {
    const float scale = static_cast<float>(q.levels[d] - 1) * 1.001f / 2, offset = q.levels[d] % 2 ? 0.0f : 0.5f;
    const float bound = p.bounded[row * q.dims + d] * scale - offset;
    from_float(bound / static_cast<float>(q.levels[d] / 2), static_cast<T*>(q.codes) + row * q.dims + d);
  }
}

template <typename T>
void write_drawn(const FsqQuantize& q, int64_t row, uint64_t id) {
  fsq_store_id(q.ids, q.id_type, row, static_cast<int64_t>(id));
  for (int d = 0; d < q.dims; ++d) {
    const uint64_t level = static_cast<uint64_t>(q.levels[d]), rest = id / level;
    from_float(fsq_code(static_cast<int>(id - rest * level), q.levels[d] / 2),
               static_cast<T*>(q.codes) + row * q.dims + d);
    id = rest;
  }
}

template <typename T>
void train_rows(const FsqTrain& p, int64_t begin, int64_t end) {
  const FsqStream stream = fsq_stream(p);
  int64_t sample = -1;
  FsqSample of_sample{};
  Words words;
  for (int64_t first = begin; first < end; first += kTokens) {
    if (p.replaced) words_of_tokens(stream, first, words);
    for (int64_t row = first; row < end && row < first + kTokens; ++row) {
      const int64_t own = fsq_sample_of(p, row);
      if (own != sample || row == begin) of_sample = fsq_sample(p, stream, sample = own);
      const bool replaced = p.replaced && words.chance[row - first] < of_sample.replace;
      if (p.replaced) p.replaced[row] = replaced;
      if (replaced)
        write_drawn<T>(p.rows, row, words.drawn[row - first] % static_cast<uint64_t>(p.rows.codebook));
      else if (of_sample.dropped)
        write_unrounded<T>(p, row);
    }
  }
}

}  // namespace

void fsq_train_kernel(const FsqTrain& p, int64_t begin, int64_t end) {
  fsq_quantize_kernel(p.rows, begin, end);
  with_float(p.rows.dtype, [&](auto element) { train_rows<decltype(element)>(p, begin, end); });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
