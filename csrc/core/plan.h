// The layout planner: which key tiles each query tile has to visit, and which of those need no predicate; or the same
// read the other way, which query tiles see each key tile.
//
// A sequence is frames; a frame is a prefix (rank -1) and a suffix (rank 0, 1, ...). Unless a cross-frame switch says
// otherwise, a query sees the keys up to some end, its reach, and reach never falls from row to row: a tile pair is
// settled from the reach of the first and the last row. With switches, the tokens of one frame part within a tile form
// a piece; between two pieces visibility is all, nothing, or rank_k <= rank_q, so a tile pair is settled from rank
// ranges: piece by piece where the tiles share a frame, by one summary per part where all keys are of earlier frames.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
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
  bool transposed;  // rows of the plan are key tiles, its runs are of query tiles
};

struct Plan {
  std::vector<int32_t> tiles;  // rows of 4: sequence, first row, end row, number of full runs
  std::vector<int32_t> ptr;    // tile i visits runs ptr[i] .. ptr[i + 1]
  std::vector<int32_t> runs;   // rows of 3: first, end, full; the full runs of a tile come first
};

// one side of a batch: frame_offsets [batch + 1] into prefix and suffix lengths
struct Side {
  const int32_t* frame_offsets;
  const int32_t* prefix;
  const int32_t* suffix;

  Frames frames(int64_t b) const {
    const int32_t first = frame_offsets[b];
    return Frames{prefix + first, suffix + first, frame_offsets[b + 1] - first};
  }
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
  int32_t at = 0, room = 0;
  for (int32_t frame = 0; frame < frames.count; ++frame) {
    for (int32_t part = 0; part < 2; ++part) {
      const int32_t length = part ? frames.suffix[frame] : frames.prefix[frame];
      for (int32_t done = 0; done < length;) {
        if (room == 0) {
          out.open(at, frame);
          room = block ? block : length;
        }
        const int32_t tokens = std::min(room, length - done);
        out.add({frame, part, part ? done : -1, part ? done + tokens - 1 : -1}, tokens);
        done += tokens;
        at += tokens;
        room -= tokens;
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

inline Seen see(const Spec& spec, const Tiling& qs, const Tile& q, const Tiling& ks, const Tile& k, int32_t shift) {
  Seen seen;
  switch (spec.mask) {
    case kFull:
      seen.add(true, true);
      return seen;
    case kCausal:
      seen.add(k.begin < q.end + shift, k.end <= q.begin + 1 + shift);
      return seen;
    case kFrameCausal:
      seen.add(k.frame_first <= q.frame_last, k.frame_last <= q.frame_first);
      return seen;
    default:
      return see_frame_prefix(spec, qs, q, ks, k);
  }
}

inline int32_t rows_as_int32(size_t values, size_t width) {
  if (values / width > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::length_error("the plan must have fewer than 2**31 tiles: raise block_q and block_k");
  }
  return static_cast<int32_t>(values / width);
}

// where a sequence's rows and columns begin in the packed batch; rows are keys in a transposed plan
struct Place {
  Place(const Spec& spec, int32_t sequence, int32_t q_start, int32_t k_start)
      : sequence(sequence), row(spec.transposed ? k_start : q_start), column(spec.transposed ? q_start : k_start) {}

  int32_t sequence, row, column;
};

inline void close_tile(const Place& at, int32_t begin, int32_t end, int32_t full_runs, Plan& out) {
  out.tiles.insert(out.tiles.end(), {at.sequence, at.row + begin, at.row + end, full_runs});
  out.ptr.push_back(rows_as_int32(out.runs.size(), 3));
}

inline int32_t add_run(const Place& at, int32_t begin, int32_t end, bool full, Plan& out) {
  if (begin >= end) return 0;
  out.runs.insert(out.runs.end(), {at.column + begin, at.column + end, full});
  return 1;
}

// The keys [0, reach) that a query sees, asked for rows in ascending order.
class Reach {
 public:
  Reach(const Spec& spec, const Frames& queries, const Frames& keys, int64_t q_tokens, int64_t k_tokens)
      : mask_(spec.mask), queries_(queries), keys_(keys), end_(0) {
    const int32_t q = static_cast<int32_t>(q_tokens), k = static_cast<int32_t>(k_tokens);
    if (mask_ == kFull || mask_ == kCausal) {
      end_ = q;
      first_ = mask_ == kFull ? k : k - q + 1;
      slope_ = mask_ == kCausal;
      limit_ = k;
    }
  }

  int32_t operator()(int32_t row) {
    while (row >= end_) next_part();
    return std::max(0, std::min(first_ + slope_ * (row - begin_), limit_));
  }

 private:
  // the keys' frame of the same index; past the last one, all keys are of earlier frames
  void next_part() {
    const int32_t frame = part_ / 2, suffix = part_ % 2;
    ++part_;
    const bool exists = frame < keys_.count;
    if (!suffix) {
      past_ = limit_;
      limit_ = past_ + (exists ? keys_.prefix[frame] + keys_.suffix[frame] : 0);
    }
    begin_ = end_;
    end_ += suffix ? queries_.suffix[frame] : queries_.prefix[frame];
    const int32_t prefix_end = past_ + (exists ? keys_.prefix[frame] : 0);
    slope_ = mask_ == kFrameCausalPrefix && suffix;
    first_ = mask_ == kFrameCausal ? limit_ : prefix_end + slope_;
  }

  const int mask_;
  const Frames queries_, keys_;
  int32_t part_ = 0, past_ = 0, begin_ = 0, end_ = 0, first_ = 0, slope_ = 0, limit_ = 0;
};

// a query tile: every row sees the keys [0, all), some row those up to any
struct Reached {
  int32_t begin, end, all, any;
};

inline void reach_tiles(Reach reach, int32_t tokens, int32_t block, std::vector<Reached>& out) {
  out.clear();
  for (int32_t begin = 0; begin < tokens; begin = out.back().end) {
    const int32_t end = begin + std::min(block, tokens - begin), all = reach(begin);
    out.push_back({begin, end, all, reach(end - 1)});
  }
}

inline void plan_by_reach(const std::vector<Reached>& queries, int32_t keys, int32_t block, const Place& at,
                          Plan& out) {
  for (const Reached& q : queries) {
    const int32_t all = q.all >= keys ? keys : q.all / block * block;
    const int32_t any = static_cast<int32_t>(std::min<int64_t>(keys, (int64_t{q.any} + block - 1) / block * block));
    const int32_t full_runs = add_run(at, 0, all, true, out);
    add_run(at, all, any, false, out);
    close_tile(at, q.begin, q.end, full_runs, out);
  }
}

inline void plan_by_reach_transposed(const std::vector<Reached>& queries, int32_t keys, int32_t block, const Place& at,
                                     Plan& out) {
  const size_t count = queries.size();
  size_t some = 0, every = 0;
  for (int32_t begin = 0, end; begin < keys; begin = end) {
    end = begin + std::min(block, keys - begin);
    while (some < count && queries[some].any <= begin) ++some;
    for (every = std::max(some, every); every < count && queries[every].all < end;) ++every;
    int32_t full_runs = 0;
    if (every < count) full_runs = add_run(at, queries[every].begin, queries[count - 1].end, true, out);
    if (some < every) add_run(at, queries[some].begin, queries[every - 1].end, false, out);
    close_tile(at, begin, end, full_runs, out);
  }
}

// tile pair by tile pair; neighbouring tiles of one kind become one run
inline void plan_by_tiles(const Spec& spec, const Tiling& qs, const Tiling& ks, int32_t shift, const Place& at,
                          Plan& out) {
  std::vector<std::pair<int32_t, int32_t>> runs[2];
  for (const Tile& row : (spec.transposed ? ks : qs).tiles) {
    for (auto& kind : runs) kind.clear();
    for (const Tile& column : (spec.transposed ? qs : ks).tiles) {
      const Tile &q = spec.transposed ? column : row, &k = spec.transposed ? row : column;
      const Seen seen = see(spec, qs, q, ks, k, shift);
      if (!seen.any) continue;
      auto& kind = runs[seen.all];
      if (!kind.empty() && kind.back().second == column.begin) {
        kind.back().second = column.end;
      } else {
        kind.push_back({column.begin, column.end});
      }
    }
    for (const bool full : {true, false}) {
      for (const auto& run : runs[full]) add_run(at, run.first, run.second, full, out);
    }
    close_tile(at, row.begin, row.end, static_cast<int32_t>(runs[true].size()), out);
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

inline void check_tokens(const Side& side, int64_t batch) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < batch; ++b) tokens += token_count(side.frames(b));
  if (tokens > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("a layout must have fewer than 2**31 tokens, got " + std::to_string(tokens));
  }
}

// room for every tile and about two runs each, so that growing is the exception
inline Plan reserved(const Side& rows, int64_t batch, int32_t block) {
  int64_t tiles = 2 * rows.frame_offsets[batch];
  if (block) {
    tiles = batch;
    for (int64_t b = 0; b < batch; ++b) tiles += token_count(rows.frames(b)) / block;
  }
  Plan plan;
  plan.tiles.reserve(4 * tiles);
  plan.ptr.reserve(tiles + 1);
  plan.runs.reserve(6 * tiles);
  return plan;
}

class Planner {
 public:
  explicit Planner(const Spec& spec) : spec_(spec) {
    const int32_t* cross = spec.cross;
    const bool switched =
        spec.mask == kFrameCausalPrefix && std::any_of(cross, cross + 4, [](int32_t rule) { return rule != kAll; });
    by_reach_ = !switched && spec.block_q && spec.block_k;
  }

  void sequence(const Frames& queries, const Frames& keys, const Place& at, Plan& out) {
    const int32_t q_tokens = static_cast<int32_t>(token_count(queries)),
                  k_tokens = static_cast<int32_t>(token_count(keys));
    if (!by_reach_) {
      tile_sequence(queries, spec_.block_q, qs_);
      tile_sequence(keys, spec_.block_k, ks_);
      return plan_by_tiles(spec_, qs_, ks_, k_tokens - q_tokens, at, out);
    }
    reach_tiles(Reach(spec_, queries, keys, q_tokens, k_tokens), q_tokens, spec_.block_q, reached_);
    (spec_.transposed ? plan_by_reach_transposed : plan_by_reach)(reached_, k_tokens, spec_.block_k, at, out);
  }

 private:
  const Spec spec_;
  bool by_reach_;
  Tiling qs_, ks_;
  std::vector<Reached> reached_;
};

// a run of identical sequences is planned once
inline Plan make(const Side& queries, const Side& keys, int64_t batch, const Spec& spec) {
  check_tokens(queries, batch);
  check_tokens(keys, batch);
  Plan out = reserved(spec.transposed ? keys : queries, batch, spec.transposed ? spec.block_k : spec.block_q);
  out.ptr.push_back(0);
  Planner planner(spec);
  int32_t q_start = 0, k_start = 0;
  for (int64_t b = 0, next; b < batch; b = next) {
    const Frames q = queries.frames(b), k = keys.frames(b);
    for (next = b + 1; next < batch && same_frames(q, queries.frames(next)) && same_frames(k, keys.frames(next));)
      ++next;
    const int64_t copies = next - b - 1;
    const int32_t q_tokens = static_cast<int32_t>(token_count(q)), k_tokens = static_cast<int32_t>(token_count(k));
    const int32_t row = spec.transposed ? k_tokens : q_tokens, column = spec.transposed ? q_tokens : k_tokens;

    const size_t tiles_from = out.tiles.size(), ptr_from = out.ptr.size(), runs_from = out.runs.size();
    planner.sequence(q, k, Place(spec, static_cast<int32_t>(b), q_start, k_start), out);
    const size_t values = out.runs.size() - runs_from;
    rows_as_int32(out.runs.size() + copies * values, 3);
    repeat(out.tiles, tiles_from, copies, {1, row, row, 0});
    repeat(out.ptr, ptr_from, copies, {static_cast<int32_t>(values / 3)});
    repeat(out.runs, runs_from, copies, {column, column, 0});
    q_start += static_cast<int32_t>((copies + 1) * q_tokens);
    k_start += static_cast<int32_t>((copies + 1) * k_tokens);
  }
  return out;
}

}  // namespace flexkernels::plan
