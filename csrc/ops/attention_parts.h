// How attention is divided over the threads of a CPU.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "attention.h"

namespace flexkernels {

// work of one head's query tile: rows times keys, and a share of what every tile costs
inline int64_t tile_work(const AttentionForward& p, int64_t tile) {
  int64_t keys = 64;
  for (int32_t j = p.ptr[tile]; j < p.ptr[tile + 1]; ++j) keys += p.runs[3 * j + 1] - p.runs[3 * j];
  return keys * p.rows_of(tile);
}

// bounds of `parts` runs of items of about equal work
inline Ints equal_shares(const AttentionForward& p, int64_t parts) {
  Ints work(p.tile_count);
  int64_t total = 0;
  for (int64_t i = 0; i < p.tile_count; ++i) total += (work[i] = tile_work(p, i)) * p.kv_heads;
  Ints bounds{0};
  int64_t item = 0, done = 0;
  for (int64_t first = 0, last; first < p.tile_count; first = last) {
    last = attention_first_tile(p, p.tile(first)[0] + 1);
    for (int head = 0; head < p.kv_heads; ++head) {
      for (int64_t i = first; i < last; ++i, ++item) {
        // a part ends where the middle of the next item lies beyond its share
        while (static_cast<int64_t>(bounds.size()) < parts &&
               (static_cast<double>(done) + work[i] * 0.5) * parts > static_cast<double>(total) * bounds.size()) {
          bounds.push_back(item);
        }
        done += work[i];
      }
    }
  }
  bounds.resize(parts + 1, item);
  return bounds;
}

// threads that are worth starting: each gets at least 2^18 multiply-adds of the forward
inline int64_t useful_threads(const AttentionForward& p) {
  double work = 0;
  for (int64_t i = 0; i < p.tile_count; ++i) work += static_cast<double>(tile_work(p, i)) * p.heads * p.head_dim;
  const int64_t worth = static_cast<int64_t>(work / (1 << 18));
  return worth <= 1 ? 1 : std::min<int64_t>(worth, torch::stable::get_num_threads());
}

// work(part, scratch) for every part, `bytes` of aligned scratch each
template <typename Work>
void run_parts(int64_t parts, int64_t bytes, const Tensor& like, const Work& work) {
  constexpr int64_t kAlign = 64;
  bytes = (bytes + kAlign - 1) / kAlign * kAlign;
  const Tensor scratch = empty(like, {parts * bytes + kAlign}, ScalarType::Byte);
  char* start = static_cast<char*>(scratch.mutable_data_ptr());
  start += (kAlign - reinterpret_cast<uintptr_t>(start) % kAlign) % kAlign;
  if (parts == 1) return work(0, start);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) work(part, start + part * bytes);
  });
}

}  // namespace flexkernels
