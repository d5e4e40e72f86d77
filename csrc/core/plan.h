// The layout planner: which key tiles each query tile has to visit, and which of those need no predicate.
//
// A sequence is frames; a frame is a prefix (rank -1) and a suffix (rank 0, 1, ...). Within a tile, the tokens of one
// frame part form a piece. Between two pieces visibility is all, nothing, or rank_k <= rank_q, so a tile pair is
// settled from rank ranges: piece by piece where the tiles share a frame, by one summary per part where all keys are
// of earlier frames.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace flexkernels::plan {

enum Mask : int { kFull = 0, kCausal = 1, kFrameCausal = 2, kFrameCausalPrefix = 3 };
enum Rule : int { kNone = 0, kAll = 1, kRankCausal = 2 };

struct Frames {
  const int32_t* prefix;
  const int32_t* suffix;
  int32_t count;
};

struct Spec {
  int mask;
  int32_t cross[4];  // Rule of [prefix2prefix, prefix2suffix, suffix2prefix, suffix2suffix], query2key
  int32_t block_q, block_k;
};

struct Plan {
  std::vector<int32_t> q_tiles;  // rows of 4: sequence, first row, end row, 0
  std::vector<int32_t> k_ptr;    // q tile i visits k_tiles k_ptr[i] .. k_ptr[i + 1]
  std::vector<int32_t> k_tiles;  // rows of 3: first key, end key, full
};

struct Piece {
  int32_t frame, part;  // part: 0 prefix, 1 suffix
  int32_t rank_min, rank_max;
};

struct Tile {
  int32_t begin, end;  // tokens, from the sequence start
  int32_t frame_first, frame_last;
  int32_t piece_begin, piece_end;
  Piece summary[2];  // by part; rank_min > rank_max: no such token
};

struct Tiling {
  std::vector<Tile> tiles;
  std::vector<Piece> pieces;

  void clear() {
    tiles.clear();
    pieces.clear();
  }

  void open(int32_t begin, int32_t frame) {
    const int32_t low = std::numeric_limits<int32_t>::max();
    const int32_t at = static_cast<int32_t>(pieces.size());
    tiles.push_back({begin, begin, frame, frame, at, at, {{0, 0, low, -2}, {0, 1, low, -2}}});
  }

  void add(const Piece& piece, int32_t tokens) {
    Tile& tile = tiles.back();
    pieces.push_back(piece);
    tile.piece_end = static_cast<int32_t>(pieces.size());
    tile.end += tokens;
    tile.frame_last = piece.frame;
    Piece& summary = tile.summary[piece.part];
    summary.rank_min = std::min(summary.rank_min, piece.rank_min);
    summary.rank_max = std::max(summary.rank_max, piece.rank_max);
  }
};

// tiles of `block` tokens from the sequence start; block 0: one tile per frame part
inline void tile_sequence(const Frames& frames, int32_t block, Tiling& out) {
  out.clear();
  int32_t at = 0;
  for (int32_t frame = 0; frame < frames.count; ++frame) {
    for (int32_t part = 0; part < 2; ++part) {
      const int32_t length = part ? frames.suffix[frame] : frames.prefix[frame];
      for (int32_t done = 0; done < length;) {
        const int32_t room = block ? block - at % block : length;
        const int32_t tokens = std::min(room, length - done);
        if (room == block || !block) out.open(at, frame);
        const Piece prefix{frame, 0, -1, -1}, suffix{frame, 1, done, done + tokens - 1};
        out.add(part ? suffix : prefix, tokens);
        done += tokens;
        at += tokens;
      }
    }
  }
}

struct Seen {
  bool any = false, all = true;

  void add(bool some, bool every) {
    any |= some;
    all &= every;
  }

  void add(int rule, const Piece& q, const Piece& k) {
    if (rule == kRankCausal)
      add(k.rank_min <= q.rank_max, k.rank_max <= q.rank_min);
    else
      add(rule == kAll, rule == kAll);
  }
};

inline int piece_rule(const Spec& spec, const Piece& q, const Piece& k) {
  if (k.frame > q.frame) return kNone;
  if (k.frame == q.frame) return kRankCausal;
  return spec.cross[2 * q.part + k.part];
}

inline Seen see_frame_prefix(const Spec& spec, const Tiling& qs, const Tile& q, const Tiling& ks, const Tile& k) {
  Seen seen;
  if (k.frame_last < q.frame_first) {
    for (const Piece& qp : q.summary) {
      for (const Piece& kp : k.summary) {
        if (qp.rank_min <= qp.rank_max && kp.rank_min <= kp.rank_max) {
          seen.add(spec.cross[2 * qp.part + kp.part], qp, kp);
        }
      }
    }
    return seen;
  }
  for (int32_t i = q.piece_begin; i < q.piece_end; ++i) {
    for (int32_t j = k.piece_begin; j < k.piece_end; ++j) {
      seen.add(piece_rule(spec, qs.pieces[i], ks.pieces[j]), qs.pieces[i], ks.pieces[j]);
    }
  }
  return seen;
}

inline Seen see(const Spec& spec, const Tiling& qs, const Tile& q, const Tiling& ks, const Tile& k) {
  Seen seen;
  switch (spec.mask) {
    case kFull:
      seen.add(true, true);
      return seen;
    case kCausal:
      seen.add(k.begin < q.end, k.end <= q.begin + 1);
      return seen;
    case kFrameCausal:
      seen.add(k.frame_first <= q.frame_last, k.frame_last <= q.frame_first);
      return seen;
    default:
      return see_frame_prefix(spec, qs, q, ks, k);
  }
}

// true when `k` and every later key tile lie beyond what `q` may see
inline bool beyond(const Spec& spec, const Tile& q, const Tile& k) {
  if (spec.mask == kFull) return false;
  return spec.mask == kCausal ? k.begin >= q.end : k.frame_first > q.frame_last;
}

inline int32_t rows_as_int32(size_t values, size_t width) {
  if (values / width > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::length_error("the plan must have fewer than 2**31 tiles: raise block_q and block_k");
  }
  return static_cast<int32_t>(values / width);
}

inline void plan_sequence(const Spec& spec, const Tiling& qs, const Tiling& ks, int32_t sequence, int32_t start,
                          Plan& out) {
  for (const Tile& q : qs.tiles) {
    for (const Tile& k : ks.tiles) {
      if (beyond(spec, q, k)) break;
      const Seen seen = see(spec, qs, q, ks, k);
      if (seen.any) out.k_tiles.insert(out.k_tiles.end(), {start + k.begin, start + k.end, seen.all});
    }
    out.q_tiles.insert(out.q_tiles.end(), {sequence, start + q.begin, start + q.end, 0});
    out.k_ptr.push_back(rows_as_int32(out.k_tiles.size(), 3));
  }
}

// appends `times` copies of values[from:], in rows of `width`; copy i is i * shift[column] larger
template <int width>
inline void repeat(std::vector<int32_t>& values, size_t from, int64_t times, const int32_t (&shift)[width]) {
  const size_t size = values.size() - from;
  values.resize(values.size() + times * size);
  const int32_t* __restrict read = values.data() + from;
  for (int64_t copy = 1; copy <= times; ++copy) {
    int32_t* __restrict write = values.data() + from + copy * size;
    int32_t add[width];
    for (int column = 0; column < width; ++column) add[column] = static_cast<int32_t>(copy * shift[column]);
    for (size_t i = 0; i < size; i += width) {
      for (int column = 0; column < width; ++column) write[i + column] = read[i + column] + add[column];
    }
  }
}

inline bool same_frames(const Frames& a, const Frames& b) {
  return a.count == b.count && std::equal(a.prefix, a.prefix + a.count, b.prefix) &&
         std::equal(a.suffix, a.suffix + a.count, b.suffix);
}

inline int64_t token_count(const Frames& frames) {
  int64_t tokens = 0;
  for (int32_t f = 0; f < frames.count; ++f) tokens += int64_t{frames.prefix[f]} + frames.suffix[f];
  return tokens;
}

inline void check_tokens(int64_t tokens) {
  if (tokens > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("a layout must have fewer than 2**31 tokens, got " + std::to_string(tokens));
  }
}

// frame_offsets [batch + 1] into prefix_len and suffix_len; a run of identical sequences is planned once
inline Plan make(const int32_t* frame_offsets, int64_t batch, const int32_t* prefix_len, const int32_t* suffix_len,
                 const Spec& spec) {
  const auto frames_of = [&](int64_t b) {
    const int32_t first = frame_offsets[b];
    return Frames{prefix_len + first, suffix_len + first, frame_offsets[b + 1] - first};
  };
  Plan out;
  out.k_ptr.push_back(0);
  Tiling qs, own_ks;
  int64_t start = 0;
  for (int64_t b = 0, next; b < batch; b = next) {
    const Frames frames = frames_of(b);
    for (next = b + 1; next < batch && same_frames(frames, frames_of(next));) ++next;
    const int64_t tokens = token_count(frames), copies = next - b - 1;
    check_tokens(start + tokens * (copies + 1));
    tile_sequence(frames, spec.block_q, qs);
    if (spec.block_k != spec.block_q) tile_sequence(frames, spec.block_k, own_ks);
    const Tiling& ks = spec.block_k == spec.block_q ? qs : own_ks;

    const size_t q_from = out.q_tiles.size(), ptr_from = out.k_ptr.size(), k_from = out.k_tiles.size();
    plan_sequence(spec, qs, ks, static_cast<int32_t>(b), static_cast<int32_t>(start), out);
    const size_t k_values = out.k_tiles.size() - k_from;
    rows_as_int32(out.k_tiles.size() + copies * k_values, 3);
    const int32_t shift = static_cast<int32_t>(tokens);
    repeat(out.q_tiles, q_from, copies, {1, shift, shift, 0});
    repeat(out.k_ptr, ptr_from, copies, {static_cast<int32_t>(k_values / 3)});
    repeat(out.k_tiles, k_from, copies, {shift, shift, 0});
    start += tokens * (copies + 1);
  }
  return out;
}

}  // namespace flexkernels::plan
