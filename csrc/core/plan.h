// The layout planner: which keys each tile of query rows has to visit, and which of those need no predicate; and, for
// each tile of keys, the rows that see them.
//
// A sequence is frames; a frame is a prefix (rank -1) and a suffix (rank 0, 1, ...). Unless a cross-frame switch says
// otherwise, a query sees the keys up to some end, its reach, and reach never falls from row to row: a tile is settled
// by the reach of its first and its last row. With switches, the rows of one frame part within a tile form a piece;
// between two pieces visibility is all, nothing, or rank_k <= rank_q, so tiles are settled piece by piece.
//
// Tiles of rows start at frame parts, whose rows see (nearly) the same keys, and hold whole blocks of them; what is
// left over of all parts is gathered into tiles of its own.
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

struct Spec {
  int mask;
  int32_t cross[4];  // Rule of [prefix2prefix, prefix2suffix, suffix2prefix, suffix2suffix], query2key
  int32_t rows;      // of a tile of queries, at most
  int32_t step;  // of a tile of keys, at most; and what full runs are multiples of unless they end with the sequence

  bool switched() const {
    return mask == kFrameCausalPrefix && std::any_of(cross, cross + 4, [](int32_t rule) { return rule != kAll; });
  }
};

// a tile: sequence, first, end, number of full runs; then, without switches, the runs at a glance as begin, middle and
// end: every row sees the keys [begin, middle), some see [middle, end); of a tile of keys, some are seen by the rows
// [begin, middle) and all by [middle, end)
constexpr int kTileColumns = 8;
constexpr int kRunColumns = 3;

struct Tiles {
  std::vector<int32_t> tiles;
  std::vector<int32_t> ptr{0};  // tile i visits runs ptr[i] .. ptr[i + 1]
  std::vector<int32_t> runs;    // first, end, full; the full runs of a tile come first
};

struct Plan {
  Tiles queries;               // first, end count rows tile by tile
  Tiles keys;                  // first, end are keys, and runs are of rows
  std::vector<int32_t> rows;   // [query tiles, Spec::rows]: the rows of a tile, the last one repeated
  std::vector<int32_t> reach;  // [queries]: the end of the keys that a row sees; empty with switches
};

struct Frames {
  const int32_t* prefix;
  const int32_t* suffix;
  int32_t count;
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

inline int64_t token_count(const Frames& frames) {
  int64_t tokens = 0;
  for (int32_t f = 0; f < frames.count; ++f) tokens += int64_t{frames.prefix[f]} + frames.suffix[f];
  return tokens;
}

// neighbouring tokens of one sequence, all of one part of a frame: 0 prefix, 1 suffix
struct Part {
  int32_t begin, end, frame, part;
};

inline void list_parts(const Frames& frames, std::vector<Part>& out) {
  out.clear();
  int32_t at = 0;
  for (int32_t frame = 0; frame < frames.count; ++frame) {
    const int32_t lengths[] = {frames.prefix[frame], frames.suffix[frame]};
    for (int32_t part = 0; part < 2; ++part) {
      if (lengths[part]) out.push_back({at, at + lengths[part], frame, part});
      at += lengths[part];
    }
  }
}

// The keys [0, reach) that a query sees, asked for rows in ascending order.
class Reach {
 public:
  Reach(int mask, const Frames& queries, const Frames& keys, int32_t q, int32_t k)
      : mask_(mask), queries_(queries), keys_(keys) {
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

// rows of a tile, in segments of one part each
struct RowTile {
  int32_t count = 0;
  std::vector<Part> segments;

  int32_t first() const { return segments.front().begin; }
  int32_t last() const { return segments.back().end - 1; }

  void add(const Part& part, int32_t begin, int32_t end) {
    segments.push_back({begin, end, part.frame, part.part});
    count += end - begin;
  }
};

// whole blocks of each part, then blocks of what is left over; in the order of their last rows
inline std::vector<RowTile> gather(const std::vector<Part>& parts, int32_t block) {
  std::vector<RowTile> whole, rest;
  for (const Part& part : parts) {
    int32_t at = part.begin;
    for (; part.end - at >= block; at += block) {
      whole.emplace_back();
      whole.back().add(part, at, at + block);
    }
    while (at < part.end) {
      if (rest.empty() || rest.back().count == block) rest.emplace_back();
      const int32_t end = std::min(part.end, at + block - rest.back().count);
      rest.back().add(part, at, end);
      at = end;
    }
  }
  std::vector<RowTile> tiles(whole.size() + rest.size());
  std::merge(std::make_move_iterator(whole.begin()), std::make_move_iterator(whole.end()),
             std::make_move_iterator(rest.begin()), std::make_move_iterator(rest.end()), tiles.begin(),
             [](const RowTile& a, const RowTile& b) { return a.last() < b.last(); });
  return tiles;
}

// --- visibility of tiles with switches

struct Piece {
  int32_t frame, part;
  int32_t rank_min, rank_max;
};

struct Tile {
  int32_t begin, end;
  std::vector<Piece> pieces;  // frames ascend

  void add(const Part& part, int32_t begin, int32_t end, int32_t part_begin) {
    const int32_t rank = begin - part_begin;
    pieces.push_back({part.frame, part.part, part.part ? rank : -1, part.part ? rank + end - begin - 1 : -1});
  }
};

struct Seen {
  bool any = false, all = true;

  void add(int rule, const Piece& q, const Piece& k) {
    const bool some = rule == kRankCausal ? k.rank_min <= q.rank_max : rule == kAll;
    const bool every = rule == kRankCausal ? k.rank_max <= q.rank_min : rule == kAll;
    any |= some;
    all &= every;
  }
};

inline Seen see(const Spec& spec, const Tile& q, const Tile& k) {
  Seen seen;
  for (const Piece& a : q.pieces) {
    for (const Piece& b : k.pieces) {
      const int rule = b.frame > a.frame ? kNone : b.frame == a.frame ? kRankCausal : spec.cross[2 * a.part + b.part];
      seen.add(rule, a, b);
      if (seen.any && !seen.all) return seen;
    }
  }
  return seen;
}

// tiles of `block` tokens from the sequence start
inline std::vector<Tile> cut(const std::vector<Part>& parts, int32_t block) {
  std::vector<Tile> tiles;
  for (const Part& part : parts) {
    for (int32_t at = part.begin; at < part.end;) {
      if (tiles.empty() || tiles.back().end - tiles.back().begin == block) tiles.push_back({at, at, {}});
      Tile& tile = tiles.back();
      const int32_t end = std::min(part.end, tile.begin + block);
      tile.add(part, at, end, part.begin);
      tile.end = at = end;
    }
  }
  return tiles;
}

// --- one sequence

inline int32_t rows_as_int32(size_t values, size_t width) {
  if (values / width > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::length_error("the plan must have fewer than 2**31 runs, got more");
  }
  return static_cast<int32_t>(values / width);
}

inline int32_t add_run(int32_t start, int32_t begin, int32_t end, bool full, Tiles& out) {
  if (begin >= end) return 0;
  out.runs.insert(out.runs.end(), {start + begin, start + end, full});
  return 1;
}

inline void close_tile(int32_t sequence, int32_t first, int32_t end, int32_t full_runs, int32_t begin, int32_t middle,
                       int32_t last, Tiles& out) {
  out.tiles.insert(out.tiles.end(), {sequence, first, end, full_runs, begin, middle, last, 0});
  out.ptr.push_back(rows_as_int32(out.runs.size(), kRunColumns));
}

class Planner {
 public:
  explicit Planner(const Spec& spec) : spec_(spec), switched_(spec.switched()) {}

  // appends a sequence whose rows and keys start at q_start and k_start
  void add(const Frames& queries, const Frames& keys, int32_t sequence, int32_t q_start, int32_t k_start, Plan& out) {
    list_parts(queries, q_parts_);
    const int32_t q = static_cast<int32_t>(token_count(queries)), k = static_cast<int32_t>(token_count(keys));
    if (switched_) {
      list_parts(keys, k_parts_);
      return plan_switched(sequence, q_start, k_start, out);
    }
    reach_.resize(q);
    Reach reach(spec_.mask, queries, keys, q, k);
    for (int32_t row = 0; row < q; ++row) out.reach.push_back(k_start + (reach_[row] = reach(row)));
    plan_by_reach(sequence, q_start, k_start, out);
    plan_keys_by_reach(sequence, k, q_start, k_start, out);
  }

 private:
  // parts whose rows see the same keys become one
  void join_parts() {
    if (spec_.mask == kFrameCausalPrefix || q_parts_.empty()) return;
    size_t last = 0;
    for (size_t i = 1; i < q_parts_.size(); ++i) {
      if (spec_.mask != kFrameCausal || q_parts_[i].frame == q_parts_[last].frame) {
        q_parts_[last].end = q_parts_[i].end;
      } else {
        q_parts_[++last] = q_parts_[i];
      }
    }
    q_parts_.resize(last + 1);
  }

  void list_rows(const RowTile& tile, int32_t q_start, Plan& out) const {
    for (const Part& segment : tile.segments) {
      for (int32_t row = segment.begin; row < segment.end; ++row) out.rows.push_back(q_start + row);
    }
    out.rows.resize(out.rows.size() + spec_.rows - tile.count, q_start + tile.last());
  }

  void plan_by_reach(int32_t sequence, int32_t q_start, int32_t k_start, Plan& out) {
    join_parts();
    int32_t first = q_start;
    for (const RowTile& tile : gather(q_parts_, spec_.rows)) {
      const int32_t least = reach_[tile.first()], most = reach_[tile.last()];
      const int32_t all = least == most ? most : least / spec_.step * spec_.step;
      const int32_t full_runs = add_run(k_start, 0, all, true, out.queries);
      add_run(k_start, all, most, false, out.queries);
      close_tile(sequence, first, first + tile.count, full_runs, k_start, k_start + all, k_start + most, out.queries);
      list_rows(tile, q_start, out);
      first += tile.count;
    }
  }

  // rows that see all of a tile are the last ones: whole steps of them are a full run
  void plan_keys_by_reach(int32_t sequence, int32_t keys, int32_t q_start, int32_t k_start, Plan& out) {
    const int32_t rows = static_cast<int32_t>(reach_.size());
    for (int32_t begin = 0, end; begin < keys; begin = end) {
      end = begin + std::min(spec_.step, keys - begin);
      const auto some = std::upper_bound(reach_.begin(), reach_.end(), begin);
      const auto every = std::lower_bound(some, reach_.end(), end);
      const int32_t any = static_cast<int32_t>(some - reach_.begin()),
                    all = static_cast<int32_t>(every - reach_.begin());
      const int32_t middle = any == all ? all : rows - (rows - all) / spec_.step * spec_.step;
      const int32_t full_runs = add_run(q_start, middle, rows, true, out.keys);
      add_run(q_start, any, middle, false, out.keys);
      close_tile(sequence, k_start + begin, k_start + end, full_runs, q_start + any, q_start + middle, q_start + rows,
                 out.keys);
    }
  }

  void plan_switched(int32_t sequence, int32_t q_start, int32_t k_start, Plan& out) {
    const std::vector<Tile> columns = cut(k_parts_, spec_.step), steps = cut(q_parts_, spec_.step);
    int32_t first = q_start;
    for (const RowTile& gathered : gather(q_parts_, spec_.rows)) {
      Tile tile{first, first + gathered.count, {}};
      for (const Part& segment : gathered.segments) tile.add(segment, segment.begin, segment.end, part_begin(segment));
      add_tile(sequence, tile, 0, k_start, columns, false, out.queries);
      list_rows(gathered, q_start, out);
      first = tile.end;
    }
    for (const Tile& tile : columns) add_tile(sequence, tile, k_start, q_start, steps, true, out.keys);
  }

  // where the part begins that holds a segment's rows
  int32_t part_begin(const Part& segment) const {
    const auto after = std::upper_bound(q_parts_.begin(), q_parts_.end(), segment.begin,
                                        [](int32_t row, const Part& part) { return row < part.begin; });
    return (after - 1)->begin;
  }

  // tile pair by tile pair; neighbours of one kind become one run
  void add_tile(int32_t sequence, const Tile& row, int32_t start, int32_t other_start, const std::vector<Tile>& others,
                bool transposed, Tiles& out) {
    for (auto& kind : found_) kind.clear();
    for (const Tile& other : others) {
      const Seen seen = transposed ? see(spec_, other, row) : see(spec_, row, other);
      if (!seen.any) continue;
      auto& kind = found_[seen.all];
      if (!kind.empty() && kind.back().second == other.begin) {
        kind.back().second = other.end;
      } else {
        kind.push_back({other.begin, other.end});
      }
    }
    for (const bool full : {true, false}) {
      for (const auto& run : found_[full]) add_run(other_start, run.first, run.second, full, out);
    }
    close_tile(sequence, start + row.begin, start + row.end, static_cast<int32_t>(found_[true].size()), 0, 0, 0, out);
  }

  const Spec spec_;
  const bool switched_;
  std::vector<Part> q_parts_, k_parts_;
  std::vector<int32_t> reach_;
  std::vector<std::pair<int32_t, int32_t>> found_[2];
};

// --- a batch

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

inline void check_tokens(const Side& side, int64_t batch) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < batch; ++b) tokens += token_count(side.frames(b));
  if (tokens > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("a layout must have fewer than 2**31 tokens, got " + std::to_string(tokens));
  }
}

// how much a plan holds before a sequence, to copy what that one adds
struct Marks {
  explicit Marks(const Tiles& t) : tiles(t.tiles.size()), ptr(t.ptr.size()), runs(t.runs.size()) {}

  // of a sequence with `row` tokens in its tiles and `column` in its runs; a glance at the runs moves by `glance`
  void copy(Tiles& t, int64_t copies, int32_t row, int32_t column, int32_t glance) const {
    const size_t values = t.runs.size() - runs;
    rows_as_int32(t.runs.size() + copies * values, kRunColumns);
    repeat(t.tiles, tiles, copies, {1, row, row, 0, glance, glance, glance, 0});
    repeat(t.ptr, ptr, copies, {static_cast<int32_t>(values / kRunColumns)});
    repeat(t.runs, runs, copies, {column, column, 0});
  }

  size_t tiles, ptr, runs;
};

// a run of identical sequences is planned once
inline Plan make(const Side& queries, const Side& keys, int64_t batch, const Spec& spec) {
  check_tokens(queries, batch);
  check_tokens(keys, batch);
  Plan out;
  Planner planner(spec);
  int32_t q_start = 0, k_start = 0;
  for (int64_t b = 0, next; b < batch; b = next) {
    const Frames q = queries.frames(b), k = keys.frames(b);
    for (next = b + 1; next < batch && same_frames(q, queries.frames(next)) && same_frames(k, keys.frames(next));)
      ++next;
    const int64_t copies = next - b - 1;
    const int32_t q_tokens = static_cast<int32_t>(token_count(q)), k_tokens = static_cast<int32_t>(token_count(k));
    const Marks of_queries(out.queries), of_keys(out.keys);
    const size_t rows = out.rows.size(), reach = out.reach.size();
    planner.add(q, k, static_cast<int32_t>(b), q_start, k_start, out);
    of_queries.copy(out.queries, copies, q_tokens, k_tokens, spec.switched() ? 0 : k_tokens);
    of_keys.copy(out.keys, copies, k_tokens, q_tokens, spec.switched() ? 0 : q_tokens);
    repeat(out.rows, rows, copies, {q_tokens});
    repeat(out.reach, reach, copies, {k_tokens});
    q_start += static_cast<int32_t>((copies + 1) * q_tokens);
    k_start += static_cast<int32_t>((copies + 1) * k_tokens);
  }
  return out;
}

}  // namespace flexkernels::plan
