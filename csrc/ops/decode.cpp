// Decoding: attention over a key-value cache, the append to it, and the norm of query and key heads.
#include "../core/decode.h"

#include <math.h>

#include <tuple>

#include "../core/head_norm.h"
#include "op.h"

namespace flexkernels {
namespace {

constexpr int kMaxQueries = 16;

// a tensor of `like`'s dtype and device with neighbours in its last dimension; the other strides go to `strides`
void check_strided(const char* name, const Tensor& t, int64_t dim, const Tensor& like, int64_t* strides) {
  check_dim(name, t, dim);
  check_scalar_type(name, t, like.scalar_type());
  check_device(name, t, like);
  STD_TORCH_CHECK(t.stride(dim - 1) == 1 || t.size(dim - 1) <= 1, name,
                  " must have stride 1 in its last dimension, got ", t.stride(dim - 1));
  for (int64_t d = 0; d + 1 < dim; ++d) strides[d] = t.stride(d);
}

int checked_head_dim(int64_t head_dim) {
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kDecodeMaxHeadDim, "head_dim must lie between 1 and ", kDecodeMaxHeadDim,
                  ", got ", head_dim);
  return static_cast<int>(head_dim);
}

void check_range(const char* name, const int32_t* values, int64_t n, int64_t low, int64_t high) {
  // on a GPU looking at them would wait: the kernels take care
  if (kCuda) return;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(values[i] >= low && values[i] <= high, name, " must lie between ", low, " and ", high, ", got ",
                    values[i]);
  }
}

// k and v [batch, kv_heads, max_len, head_dim]; returns cache_len, made contiguous
Tensor check_caches(const Tensor& k, const Tensor& v, const Tensor& cache_len, const Tensor& like, int64_t head_dim,
                    int64_t least, int64_t* k_stride, int64_t* v_stride) {
  const int64_t batch = like.size(0);
  check_strided("k_cache", k, 4, like, k_stride);
  check_strided("v_cache", v, 4, like, v_stride);
  check_size("k_cache", k, 0, batch);
  check_size("k_cache", k, 3, head_dim);
  STD_TORCH_CHECK(k.size(1) >= 1, "k_cache must have at least 1 head, got ", k.size(1));
  for (int64_t d = 0; d < 4; ++d) check_size("v_cache", v, d, k.size(d));
  check_scalar_type("cache_len", cache_len, ScalarType::Int);
  check_dim("cache_len", cache_len, 1);
  check_numel("cache_len", cache_len, batch);
  check_device("cache_len", cache_len, like);
  const Tensor lengths = as_contiguous(cache_len);
  check_range("cache_len", read<int32_t>(lengths), batch, least, k.size(2));
  return lengths;
}

// --- attention

#ifdef FLEXKERNELS_CUDA
// without looking at the lengths
void count_splits(DecodeAttention& p) {
  STD_TORCH_CHECK(p.batch <= 65535, "q must have at most 65535 sequences, got ", p.batch);
  const int split = p.dtype == Dtype::f32 ? kDecodeSplit : decode_mma_split(p.head_dim);
  p.splits = static_cast<int>((p.max_len + split - 1) / split);
}

void run(const DecodeAttention& p, const Tensor& like) { FLEXKERNELS_LAUNCH(decode_attention, p, like, p.batch, 0); }
#else
void count_splits(DecodeAttention& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) longest = decode_length(p, b) > longest ? decode_length(p, b) : longest;
  p.splits = decode_splits(longest);
}

void run(DecodeAttention p, const Tensor& like) {
  int64_t splits = 0, keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    splits += decode_splits(decode_length(p, b));
    keys += decode_length(p, b);
  }
  const int64_t tiles = decode_tiles(p), units = p.kv_heads * tiles * splits;
  OptionalTensor done;
  if (p.splits > 1) {
    done = empty(like, {p.batch * p.kv_heads * tiles}, ScalarType::Int);
    p.done = static_cast<int32_t*>(done->mutable_data_ptr());
    memset(p.done, 0, bytes_of(*done));
  }
  // a unit reads keys and values and multiplies each by its rows
  const int64_t rows = p.rows < kDecodeTile ? p.rows : kDecodeTile;
  const int64_t per_unit = (keys / (splits + 1) + 1) * p.head_dim * 2 * (rows + 1) / 2;
  FLEXKERNELS_LAUNCH(decode_attention, p, like, units, per_unit);
}
#endif

// fills out [batch, n, heads, head_dim] and, where it is given, lse [batch, n, heads]
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len,
            const OptionalTensor& key_log_weight, std::optional<double> softmax_scale, bool causal, const Tensor& out,
            const OptionalTensor& lse) {
  DecodeAttention p{};
  p.dtype = float_dtype("q", q);
  check_dim("q", q, 4);
  const Tensor rows = dense_rows(q);
  check_strided("q", rows, 4, q, p.q_stride);
  p.batch = q.size(0);
  p.head_dim = checked_head_dim(q.size(3));
  const Tensor lengths = check_caches(k, v, cache_len, q, p.head_dim, 0, p.k_stride, p.v_stride);
  STD_TORCH_CHECK(q.size(1) >= 1 && q.size(1) <= kMaxQueries, "q must have 1 to ", kMaxQueries,
                  " tokens a sequence, got ", q.size(1));
  STD_TORCH_CHECK(q.size(2) >= 1 && q.size(2) % k.size(1) == 0, "q must have a multiple of ", k.size(1), " heads, got ",
                  q.size(2));
  p.n = static_cast<int>(q.size(1));
  p.heads = static_cast<int>(q.size(2));
  p.kv_heads = static_cast<int>(k.size(1));
  p.group = p.heads / p.kv_heads;
  p.rows = p.n * p.group;
  p.max_len = k.size(2);
  const double scale = softmax_scale ? *softmax_scale : 1 / sqrt(static_cast<double>(p.head_dim));
  STD_TORCH_CHECK(isfinite(scale), "softmax_scale must be finite, got ", scale);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  const OptionalTensor weight = as_contiguous(key_log_weight);
  if (weight) check_dim("key_log_weight", *weight, 2);
  p.key_log_weight = read_optional<float>("key_log_weight", weight, ScalarType::Float, p.batch * p.max_len, q);
  if (weight) check_size("key_log_weight", *weight, 0, p.batch);
  if (p.batch == 0) return;
  p.q = rows.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.cache_len = read<int32_t>(lengths);
  p.out = out.mutable_data_ptr();
  p.lse = lse ? static_cast<float*>(lse->mutable_data_ptr()) : nullptr;
  count_splits(p);
  OptionalTensor partial;
  if (p.splits > 1) {
    const int64_t sums = p.batch * p.kv_heads * p.splits * p.rows;
    partial = empty(q, {sums * (decode_pitch(p.head_dim) + 2)}, ScalarType::Float);
    p.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  run(p, q);
}

std::tuple<Tensor, Tensor> decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len,
                                            OptionalTensor key_log_weight, std::optional<double> softmax_scale,
                                            bool causal, bool return_lse) {
  check_dim("q", q, 4);
  const Tensor out = empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  const Tensor lse =
      return_lse ? empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float) : empty(q, {0}, ScalarType::Float);
  attend(q, k, v, cache_len, key_log_weight, softmax_scale, causal, out,
         return_lse ? OptionalTensor(lse) : std::nullopt);
  return {out, lse};
}

// --- norms and rotary embedding

// the checked norm of an op, and what keeps its pointers alive
class Norm {
 public:
  Norm(int64_t kind, double eps, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
       const OptionalTensor& cos, const OptionalTensor& sin, int64_t head_dim, const Tensor& like) {
    STD_TORCH_CHECK(kind >= kHeadNormNone && kind <= kHeadNormRms, "norm must be 0, 1 or 2, got ", kind);
    STD_TORCH_CHECK(isfinite(eps) && eps >= 0, "eps must be finite and at least 0, got ", eps);
    STD_TORCH_CHECK(kind != kHeadNormNone || (!q_weight && !k_weight), "a weight must be absent without a norm");
    args.kind = static_cast<int>(kind);
    args.eps = static_cast<float>(eps);
    args.head_dim = checked_head_dim(head_dim);
    args.q_weight = take_weight("q_weight", q_weight, like);
    args.k_weight = take_weight("k_weight", k_weight, like);
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together, got one of them");
    if (!cos) return;
    STD_TORCH_CHECK(head_dim % 2 == 0, "head_dim must be even for a rotary embedding, got ", head_dim);
    check_dim("cos", *cos, 2);
    args.table_rows = cos->size(0);
    STD_TORCH_CHECK(args.table_rows >= 1, "cos must have at least 1 row, got ", args.table_rows);
    args.cos = take_table("cos", cos, like);
    args.sin = take_table("sin", sin, like);
  }

  HeadNorm args{};

 private:
  const float* take(const Tensor& t) {
    kept_[count_] = as_contiguous(t);
    return read<float>(*kept_[count_++]);
  }

  const float* take_weight(const char* name, const OptionalTensor& weight, const Tensor& like) {
    if (!weight) return nullptr;
    float_dtype(name, *weight);
    check_dim(name, *weight, 1);
    check_size(name, *weight, 0, args.head_dim);
    check_device(name, *weight, like);
    return take(weight->scalar_type() == ScalarType::Float ? *weight : torch::stable::to(*weight, ScalarType::Float));
  }

  const float* take_table(const char* name, const OptionalTensor& table, const Tensor& like) {
    check_scalar_type(name, *table, ScalarType::Float);
    check_dim(name, *table, 2);
    check_size(name, *table, 0, args.table_rows);
    check_size(name, *table, 1, args.head_dim / 2);
    check_device(name, *table, like);
    return take(*table);
  }

  OptionalTensor kept_[4];
  int count_ = 0;
};

// fills q [batch, n, heads, head_dim], and positions cache_len - n .. cache_len - 1 of the caches
void append(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, int64_t heads, int64_t norm,
            const OptionalTensor& q_weight, const OptionalTensor& k_weight, double eps, const OptionalTensor& cos,
            const OptionalTensor& sin, const Tensor& q) {
  KvAppend p{};
  p.dtype = float_dtype("qkv", qkv);
  check_dim("qkv", qkv, 3);
  const Tensor rows = dense_rows(qkv);
  check_strided("qkv", rows, 3, qkv, p.qkv_stride);
  p.batch = qkv.size(0);
  p.n = qkv.size(1);
  const int64_t head_dim = k.size(3);
  const Tensor lengths = check_caches(k, v, cache_len, qkv, head_dim, p.n, p.k_stride, p.v_stride);
  const Norm checked(norm, eps, q_weight, k_weight, cos, sin, head_dim, qkv);
  p.norm = checked.args;
  p.heads = static_cast<int>(heads);
  p.kv_heads = static_cast<int>(k.size(1));
  p.max_len = k.size(2);
  STD_TORCH_CHECK(!cos || p.norm.table_rows >= p.max_len, "rope must have at least max_len = ", p.max_len,
                  " rows, got ", p.norm.table_rows);
  check_size("qkv", qkv, 2, (heads + 2 * p.kv_heads) * head_dim);
  if (p.batch * p.n == 0) return;
  p.qkv = rows.const_data_ptr();
  p.k = k.mutable_data_ptr();
  p.v = v.mutable_data_ptr();
  p.cache_len = read<int32_t>(lengths);
  p.q = q.mutable_data_ptr();
  FLEXKERNELS_LAUNCH(kv_append, p, qkv, p.batch * p.n, qkv.size(2));
}

Tensor kv_append_(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, int64_t heads,
                  int64_t norm, OptionalTensor q_weight, OptionalTensor k_weight, double eps, OptionalTensor cos,
                  OptionalTensor sin) {
  check_dim("qkv", qkv, 3);
  check_dim("k_cache", k, 4);
  STD_TORCH_CHECK(heads >= 1, "heads must be at least 1, got ", heads);
  const Tensor q = empty(qkv, {qkv.size(0), qkv.size(1), heads, k.size(3)}, qkv.scalar_type());
  append(qkv, k, v, cache_len, heads, norm, q_weight, k_weight, eps, cos, sin, q);
  return q;
}

// the table row of each token, kept by `kept`; null without a rotary embedding
const int32_t* take_positions(const OptionalTensor& positions, const HeadNorm& norm, const Tensor& qk,
                              OptionalTensor* kept) {
  STD_TORCH_CHECK(positions.has_value() == (norm.cos != nullptr), "rope and positions must be given together");
  if (!positions) return nullptr;
  check_dim("positions", *positions, 1);
  *kept = as_contiguous(*positions);
  const auto* data = read_optional<int32_t>("positions", *kept, ScalarType::Int, qk.size(0), qk);
  check_range("positions", data, qk.size(0), 0, norm.table_rows - 1);
  return data;
}

std::tuple<Tensor, Tensor> qk_norm(const Tensor& qk, int64_t heads, int64_t kv_heads, int64_t norm,
                                   OptionalTensor q_weight, OptionalTensor k_weight, double eps, OptionalTensor cos,
                                   OptionalTensor sin, OptionalTensor positions) {
  QkNorm p{};
  p.dtype = float_dtype("qk", qk);
  check_dim("qk", qk, 2);
  STD_TORCH_CHECK(heads >= 1 && kv_heads >= 1, "heads and kv_heads must be at least 1, got ", heads, " and ", kv_heads);
  const int64_t all = heads + kv_heads, head_dim = qk.size(1) / all;
  check_size("qk", qk, 1, all * head_dim);
  const Tensor rows = dense_rows(qk);
  const Norm checked(norm, eps, q_weight, k_weight, cos, sin, head_dim, qk);
  OptionalTensor kept;
  p.norm = checked.args;
  p.positions = take_positions(positions, p.norm, qk, &kept);
  p.total = qk.size(0);
  p.heads = static_cast<int>(heads);
  p.kv_heads = static_cast<int>(kv_heads);
  p.qk = rows.const_data_ptr();
  p.qk_stride = rows.stride(0);
  const Tensor q = empty(qk, {p.total, heads, head_dim}, qk.scalar_type());
  const Tensor k = empty(qk, {p.total, kv_heads, head_dim}, qk.scalar_type());
  p.q = q.mutable_data_ptr();
  p.k = k.mutable_data_ptr();
  FLEXKERNELS_LAUNCH(qk_norm, p, qk, p.total, qk.size(1));
  return {q, k};
}

// gradients of qk, and float32 [2, head_dim] of q_weight and k_weight, which is empty without them
std::tuple<Tensor, Tensor> qk_norm_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& qk, int64_t norm,
                                            OptionalTensor q_weight, OptionalTensor k_weight, double eps,
                                            OptionalTensor cos, OptionalTensor sin, OptionalTensor positions) {
  QkNormBackward p{};
  p.dtype = float_dtype("qk", qk);
  check_dim("qk", qk, 2);
  check_dim("grad_q", grad_q, 3);
  check_dim("grad_k", grad_k, 3);
  const Tensor rows = dense_rows(qk), of_q = as_contiguous(grad_q), of_k = as_contiguous(grad_k);
  const int64_t head_dim = of_q.size(2);
  p.total = qk.size(0);
  p.heads = static_cast<int>(of_q.size(1));
  p.kv_heads = static_cast<int>(of_k.size(1));
  const std::pair<const char*, const Tensor*> grads[] = {{"grad_q", &of_q}, {"grad_k", &of_k}};
  for (const auto& [name, grad] : grads) {
    check_size(name, *grad, 0, p.total);
    check_size(name, *grad, 2, head_dim);
    check_scalar_type(name, *grad, qk.scalar_type());
    check_device(name, *grad, qk);
  }
  check_size("qk", qk, 1, (p.heads + p.kv_heads) * head_dim);
  const Norm checked(norm, eps, q_weight, k_weight, cos, sin, head_dim, qk);
  OptionalTensor kept;
  p.norm = checked.args;
  p.positions = take_positions(positions, p.norm, qk, &kept);
  p.qk = rows.const_data_ptr();
  p.qk_stride = rows.stride(0);
  p.grad_q = of_q.const_data_ptr();
  p.grad_k = of_k.const_data_ptr();
  const Tensor grad_qk = empty(qk, {p.total, qk.size(1)}, qk.scalar_type());
  p.grad_qk = grad_qk.mutable_data_ptr();
  const bool weighted = q_weight || k_weight;
  const int64_t chunks = (p.total + kQkNormChunk - 1) / kQkNormChunk;
  const Tensor partial = empty(qk, {weighted ? chunks : 0, 2, head_dim}, ScalarType::Float);
  p.grad_weight = weighted ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  FLEXKERNELS_LAUNCH(qk_norm_backward, p, qk, chunks, kQkNormChunk * qk.size(1));
  if (!weighted) return {grad_qk, empty(qk, {0, head_dim}, ScalarType::Float)};
  const int64_t dim[] = {0};
  return {grad_qk, torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(dim, 1))};
}

}  // namespace

void kv_append_into(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, const Tensor& q) {
  append(qkv, k, v, cache_len, q.size(2), kHeadNormNone, {}, {}, 0, {}, {}, q);
}

void decode_attention_into(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len, bool causal,
                           const Tensor& out) {
  attend(q, k, v, cache_len, {}, {}, causal, out, {});
}

}  // namespace flexkernels

FLEXKERNELS_OPS(m) {
  m.impl("decode_attention", TORCH_BOX(&flexkernels::decode_attention));
  m.impl("kv_append_", TORCH_BOX(&flexkernels::kv_append_));
  m.impl("qk_norm", TORCH_BOX(&flexkernels::qk_norm));
  m.impl("qk_norm_backward", TORCH_BOX(&flexkernels::qk_norm_backward));
}
