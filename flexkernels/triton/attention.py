"""Structured variable-length attention in Triton over the tiles that a layout's plan lists; float32 sums.

    S = scale * q k^T + w,  P = exp(S - max S) over visible keys,  out = P v / sum P,  lse = log sum exp S

A program takes a tile of query rows, gathered by index, and a head; the heads of a tile are neighbours in the grid, so
that they share the plan's entry and, in a group, their keys. Exponentials are base 2: log2(e) is in scale and w.

Without cross-frame switches a row sees the keys up to its reach: a tile takes the keys that all of its rows see in
whole steps, without any mask, and the rest with one compare. With switches it takes the plan's runs, and where a run is
not full, what frames and ranks say.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import library, tuning
from ..layout import LISTED_STEP, switched

LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))
INT_MAX = tl.constexpr(2**31 - 1)
# below every score, and finite: a row without a key keeps it, and exp2(-inf - LOW) is 0
LOW = tl.constexpr(-3.0e38)
# stages of the steps that need a mask, of which a tile has few
MASKED_STAGES = tl.constexpr(2)
# what fits into 64 KiB of shared memory
AMD_STAGES = 2

# 307 for 3.7: other versions spill at a limit on registers that it keeps
TRITON = 100 * int(triton.__version__.split(".")[0]) + int(triton.__version__.split(".")[1])

# their values and alignment depend on lengths, which must not compile anything anew
LENGTHS = ("total", "heads", "kv_heads", "group", "listed")
METADATA = (
    *("p_reach", "p_q_frame", "p_q_rank", "p_k_frame", "p_k_rank", "p_rows", "p_tiles", "p_ptr", "p_runs"),
    *("p_weight", "p_listed", "p_lse", "p_delta", "p_norm"),
)


@triton.jit
def load_block(p, o, m_row, m_dim, MASKED: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr):
    """Rows of q, k, v or dO as an operand of tl.dot: zeros beyond the rows, and beyond head_dim."""
    if MASKED and PADDED:
        b = tl.load(p + o, mask=m_row[:, None] & m_dim[None, :], other=0.0)
    elif MASKED:
        b = tl.load(p + o, mask=m_row[:, None], other=0.0)
    elif PADDED:
        b = tl.load(p + o, mask=m_dim[None, :], other=0.0)
    else:
        b = tl.load(p + o)
    return b.to(DOT)


@triton.jit
def load_keys(
    p, tma, o, key, stride, column, m_row, m_dim,
    MASKED: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """STEP rows of k or v from `key` on. A descriptor of them, `tma`, has no mask: it serves steps that need none."""
    if tma is not None and not MASKED:
        b = tma.load([key, column]).to(DOT)
    else:
        b = load_block(p + tl.cast(key, tl.int64) * stride, o, m_row, m_dim, MASKED, PADDED, DOT)
    return b


@triton.jit
def load_tile(p_tiles, p_rows, index, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a tile: the tile, its rows, which of them are in use, and whether any is. A tile of ROWS rows has
    ROWS / BLOCK blocks; the last row stands for those that it lacks."""
    PARTS: tl.constexpr = ROWS // BLOCK
    tile, first = index // PARTS, index % PARTS * BLOCK
    count = tl.load(p_tiles + 8 * tile + 2) - tl.load(p_tiles + 8 * tile + 1)
    o_row = first + tl.arange(0, BLOCK)
    rows = tl.load(p_rows + tl.cast(tile, tl.int64) * ROWS + o_row)
    return tile, rows, o_row < count, first < count


@triton.jit
def load_span(p_tiles, tile, used):
    """begin, middle and end of what a tile visits; nothing where its block is not used."""
    begin, end = tl.load(p_tiles + 8 * tile + 4), tl.load(p_tiles + 8 * tile + 6)
    return begin, tl.load(p_tiles + 8 * tile + 5), tl.where(used, end, begin)


@triton.jit
def load_runs(p_tiles, p_ptr, tile, used):
    """The first run of a tile, how many of its runs are full, and where they end."""
    first = tl.load(p_ptr + tile)
    fulls = tl.where(used, tl.load(p_tiles + 8 * tile + 3), 0)
    return first, fulls, tl.where(used, tl.load(p_ptr + tile + 1), first)


@triton.jit
def query_terms(p_reach, p_frame, p_rank, rows, m_rows, CROSS: tl.constexpr):
    """What decides which keys a query sees: its reach; with switches its frame, its rank, and the least and the
    greatest rank that it sees in earlier frames."""
    if CROSS is None:
        terms = (tl.load(p_reach + rows, mask=m_rows, other=0),)
    else:
        b_frame = tl.load(p_frame + rows, mask=m_rows, other=0)
        b_rank = tl.load(p_rank + rows, mask=m_rows, other=0)
        # prefix keys have rank -1; a switch: 0 none, 1 full, 2 causal
        b_low = tl.where(b_rank < 0, -CROSS[0], -CROSS[2])
        b_high = tl.where(b_rank < 0, INT_MAX if CROSS[1] else -1, INT_MAX if CROSS[3] == 1 else -1)
        if CROSS[3] == 2:
            b_high = tl.where(b_rank < 0, b_high, b_rank)
        terms = b_frame, b_rank, b_low, b_high
    return terms


@triton.jit
def key_terms(p_frame, p_rank, keys, m_keys, CROSS: tl.constexpr):
    if CROSS is None:
        terms = (keys,)
    else:
        terms = tl.load(p_frame + keys, mask=m_keys, other=0), tl.load(p_rank + keys, mask=m_keys, other=0)
    return terms


@triton.jit
def sees(query, key, m, CROSS: tl.constexpr):
    """The mask, where m; terms of queries and keys broadcast against each other."""
    if CROSS is None:
        m = m & (key[0] < query[0])
    else:
        earlier = (key[0] < query[0]) & (key[1] >= query[2]) & (key[1] <= query[3])
        m = m & (earlier | ((key[0] == query[0]) & (key[1] <= query[1])))
    return m


@triton.jit
def add_weight(b_s, p_weight, o_k, m_k, MASKED: tl.constexpr):
    if p_weight is not None:
        if MASKED:
            b_s += LOG2_E * tl.load(p_weight + o_k, mask=m_k, other=0.0)
        else:
            b_s += LOG2_E * tl.load(p_weight + o_k)
    return b_s


@triton.jit
def attention_step(
    b_q, b_acc, b_max, b_sum, query, p_k, p_v, tma_k, tma_v, column, o_kd, o_vd, m_dim, p_weight, p_k_frame, p_k_rank,
    stride_k, stride_v, key, end, scale,
    MASKED: tl.constexpr, CROSS: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys key .. key + STEP."""
    o_k = key + tl.arange(0, STEP)
    m_k = o_k < end
    b_k = load_keys(p_k, tma_k, o_kd, key, stride_k, column, m_k, m_dim, MASKED, PADDED, DOT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if MASKED or p_weight is not None:
        b_s = add_weight(b_s * scale, p_weight, o_k[None, :], m_k[None, :], MASKED)
        if MASKED:
            terms = key_terms(p_k_frame, p_k_rank, o_k[None, :], m_k[None, :], CROSS)
            b_s = tl.where(sees(query, terms, m_k[None, :], CROSS), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
    else:
        # scale >= 0 commutes with max
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_shrink = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    b_v = load_keys(p_v, tma_v, o_vd, key, stride_v, column, m_k, m_dim, MASKED, PADDED, DOT)
    b_acc = tl.dot(b_p.to(DOT), b_v, b_acc * b_shrink[:, None], input_precision="ieee")
    return b_acc, b_new, b_sum


@triton.jit
def listed_step(
    b_q, b_acc, b_max, b_sum, b_reach, p_k, p_v, p_listed, o_d, m_dim, p_weight, stride_k, stride_v, end, scale,
    PADDED: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Online softmax over listed keys once more, now for what e^w exceeds 1 by: a key of weight w counts e^w times."""
    keys = tl.load(p_listed + tl.arange(0, STEP))
    # what stands for no key is beyond every end
    m_k = keys < end
    o_key = tl.where(m_k, keys, 0).to(tl.int64)
    b_k = load_block(p_k, o_key[:, None] * stride_k + o_d, m_k, m_dim, True, PADDED, DOT)
    b_w = LOG2_E * tl.load(p_weight + o_key, mask=m_k, other=0.0)
    # log2(2^w - 1), which is -inf at 0
    b_w += tl.log2(1.0 - tl.exp2(-b_w))
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale + b_w[None, :]
    b_s = tl.where(keys[None, :] < b_reach, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_shrink = tl.exp2(b_max - b_new)
    b_v = load_block(p_v, o_key[:, None] * stride_v + o_d, m_k, m_dim, True, PADDED, DOT)
    b_acc = tl.dot(b_p.to(DOT), b_v, b_acc * b_shrink[:, None], input_precision="ieee")
    return b_acc, b_new, b_sum * b_shrink + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=METADATA)
def attention_kernel(
    p_q, p_k, p_v, tma_k, tma_v, p_out, p_lse, p_weight, p_listed, p_reach, p_q_frame, p_q_rank, p_k_frame, p_k_rank,
    p_rows, p_tiles, p_ptr, p_runs,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, total, heads, group, listed, scale,
    CROSS: tl.constexpr, NEGATIVE: tl.constexpr, HEAD_DIM: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, LISTED_STEP: tl.constexpr,
):  # fmt: skip
    # q [BLOCK, BLOCK_D], k and v [STEP, BLOCK_D]; scale >= 0, its sign is NEGATIVE; p_listed [batch, listed] replaces
    # the weights of all keys
    PADDED: tl.constexpr = HEAD_DIM < BLOCK_D
    # later rows see more keys: they go first
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = (program % heads).to(tl.int64)
    tile, rows, m_q, used = load_tile(p_tiles, p_rows, program // heads, ROWS, BLOCK)
    o_d, o_step, o_row = tl.arange(0, BLOCK_D), tl.arange(0, STEP).to(tl.int64), rows.to(tl.int64)
    m_dim = o_d < HEAD_DIM
    b_q = load_block(p_q + head * stride_qh, o_row[:, None] * stride_q + o_d, m_q, m_dim, False, PADDED, DOT)
    if NEGATIVE:
        b_q = -b_q
    p_k += head // group * stride_kh
    p_v += head // group * stride_vh
    column = (head // group * HEAD_DIM).to(tl.int32)
    o_kd, o_vd = o_step[:, None] * stride_k + o_d, o_step[:, None] * stride_v + o_d
    b_acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK], LOW, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    if CROSS is None:
        p_dense = p_weight
        if p_listed is not None:
            p_dense = None
        begin, middle, end = load_span(p_tiles, tile, used)
        middle = tl.minimum(begin + (middle - begin) // STEP * STEP, end)
        for key in range(begin, middle, STEP):
            b_acc, b_max, b_sum = attention_step(
                b_q, b_acc, b_max, b_sum, None, p_k, p_v, tma_k, tma_v, column, o_kd, o_vd, m_dim, p_dense, None, None,
                stride_k, stride_v, key, end, scale, False, CROSS, PADDED, DOT, STEP,
            )  # fmt: skip
        query = query_terms(p_reach, None, None, rows[:, None], m_q[:, None], CROSS)
        for key in tl.range(middle, end, STEP, num_stages=MASKED_STAGES):
            b_acc, b_max, b_sum = attention_step(
                b_q, b_acc, b_max, b_sum, query, p_k, p_v, tma_k, tma_v, column, o_kd, o_vd, m_dim, p_dense, None, None,
                stride_k, stride_v, key, end, scale, True, CROSS, PADDED, DOT, STEP,
            )  # fmt: skip
        if p_listed is not None:
            p_listed += tl.load(p_tiles + 8 * tile) * tl.cast(listed, tl.int64)
            for at in tl.range(0, tl.where(used, listed, 0), LISTED_STEP, num_stages=1):
                b_acc, b_max, b_sum = listed_step(
                    b_q, b_acc, b_max, b_sum, query[0], p_k, p_v, p_listed + at, o_d, m_dim, p_weight,
                    stride_k, stride_v, end, scale, PADDED, DOT, LISTED_STEP,
                )  # fmt: skip
    else:
        first, fulls, last = load_runs(p_tiles, p_ptr, tile, used)
        for i in range(first, first + fulls):
            begin, end = tl.load(p_runs + 3 * i), tl.load(p_runs + 3 * i + 1)
            for key in range(begin, end - STEP + 1, STEP):
                b_acc, b_max, b_sum = attention_step(
                    b_q, b_acc, b_max, b_sum, None, p_k, p_v, tma_k, tma_v, column, o_kd, o_vd, m_dim, p_weight,
                    p_k_frame, p_k_rank, stride_k, stride_v, key, end, scale, False, CROSS, PADDED, DOT, STEP,
                )  # fmt: skip
        query = query_terms(None, p_q_frame, p_q_rank, rows[:, None], m_q[:, None], CROSS)
        for i in range(first, last):
            begin, end = tl.load(p_runs + 3 * i), tl.load(p_runs + 3 * i + 1)
            # what is left of a full run after whole steps
            begin = tl.where(i < first + fulls, end - (end - begin) % STEP, begin)
            for key in range(begin, end, STEP):
                b_acc, b_max, b_sum = attention_step(
                    b_q, b_acc, b_max, b_sum, query, p_k, p_v, tma_k, tma_v, column, o_kd, o_vd, m_dim, p_weight,
                    p_k_frame, p_k_rank, stride_k, stride_v, key, end, scale, True, CROSS, PADDED, DOT, STEP,
                )  # fmt: skip
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_out = (o_row[:, None] * heads + head) * HEAD_DIM + o_d
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q[:, None] & m_dim)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max * LN_2 + tl.log(tl.where(b_sum == 0.0, 1.0, b_sum)))
    tl.store(p_lse + head * total + rows, b_lse, mask=m_q)


def attention_triton(q, k, v, layout, key_log_weight, mask, cross, softmax_scale):
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    used = layout[1].shape[0]
    if len(q) > used:
        out[used:] = 0
        lse[:, used:] = float("-inf")
    launch(*dense(q, k, v), checked(layout), weights(key_log_weight), mask, cross, softmax_scale, out, lse)
    return out, lse


def launch(q, k, v, layout, key_log_weight, mask, cross, softmax_scale, out, lse, chosen=None):
    """Fills the rows of out ``[total, heads, head_dim]`` and lse ``[heads, total]`` that the layout holds.

    ``chosen`` replaces the tuning table's entry.
    """
    _, q_frame, q_rank, _, k_frame, k_rank, reach, rows, tiles, ptr, runs, *_, weighted = layout
    heads, scale, listed = q.shape[1], scale_of(q, softmax_scale), weighted.shape[1]
    # with switches weights are those of all keys
    p_listed = weighted if key_log_weight is not None and listed and not switched(mask, cross) else None
    chosen = chosen or choice("attention_forward", q, rows, mask, cross)
    if len(tiles) == 0 or heads == 0:
        return
    with torch.cuda.device_of(q):
        attention_kernel[(len(tiles) * (rows.shape[1] // chosen["block"]) * heads,)](
            q, k, v, *descriptors(k, v, chosen), out, lse, key_log_weight, p_listed,
            reach, q_frame, q_rank, k_frame, k_rank,
            rows, tiles, ptr, runs,
            *strides(q, k, v), len(q), heads, heads // k.shape[1], listed, abs(scale) * LOG2_E.value,
            NEGATIVE=scale < 0, ROWS=rows.shape[1], LISTED_STEP=LISTED_STEP,
            **constants(q, mask, cross), **options(chosen),
        )  # fmt: skip


def choice(kernel: str, q, rows, mask, cross) -> dict:
    """Blocks, steps, warps, stages and registers of a kernel, from the tuning table; a block is at most a tile."""
    facts = dict(bytes=q.element_size(), head_dim=q.shape[2], rows=rows.shape[1], switched=switched(mask, cross))
    chosen = tuning.choose(kernel, **facts, triton=TRITON)
    return chosen | {"block": min(chosen["block"], rows.shape[1])}


def descriptors(k, v, chosen: dict):
    """TMA descriptors of k and v as ``[total_k, kv_heads * head_dim]``, from which a load takes STEP rows of a head;
    None, for pointers, where the table does not want them or this GPU or these tensors cannot have them."""
    if not (chosen.get("tma") and has_tma(k.device) and describable(k) and describable(v)):
        return None, None
    shape, block = [k.shape[0], k.shape[1] * k.shape[2]], [chosen["step"], k.shape[2]]
    return tuple(TensorDescriptor(x, shape, [x.stride(0), 1], block) for x in (k, v))


@functools.cache
def has_tma(device: torch.device) -> bool:
    """NVIDIA's GPUs from compute capability 9.0 on; the interpreter has it too."""
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0))


def describable(x) -> bool:
    """Whether its heads lie side by side and fill a block's rows, in rows apart that begin on 16 bytes."""
    rows, heads, head_dim = x.shape
    beside = heads == 1 or x.stride(1) == head_dim
    apart = x.stride(0) >= heads * head_dim and x.stride(0) * x.element_size() % 16 == 0
    return rows > 0 and beside and apart and head_dim == padded(head_dim) and x.data_ptr() % 16 == 0


def options(chosen: dict) -> dict:
    made = dict(BLOCK=chosen["block"], STEP=chosen["step"], num_warps=chosen["warps"], num_stages=chosen["stages"])
    if torch.version.hip is not None:
        made["num_stages"] = min(made["num_stages"], AMD_STAGES)
    # a limit on registers is NVIDIA's
    if "maxnreg" in chosen and torch.version.hip is None:
        made["maxnreg"] = chosen["maxnreg"]
    return made


def constants(q, mask, cross) -> dict:
    # the interpreter multiplies the bits of bfloat16: there operands are float32
    widen = library.interpreting() and q.dtype == torch.bfloat16
    dot = tl.float32 if widen else getattr(tl, str(q.dtype).removeprefix("torch."))
    head_dim, cross = q.shape[2], tuple(cross) if switched(mask, cross) else None
    return dict(CROSS=cross, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), DOT=dot)


def padded(head_dim: int) -> int:
    """The row of a block: tl.dot takes 16 or more, and a block's sides are powers of two."""
    return max(16, triton.next_power_of_2(head_dim))


def dense(*tensors):
    """The same with neighbours in the last dimension."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def checked(layout):
    """The layout. Raises ValueError where a caller has made views of its tensors."""
    if not all(t.is_contiguous() for t in layout):
        raise ValueError("the tensors of a layout must be contiguous, as SequenceLayout makes them")
    return layout


def weights(key_log_weight):
    return None if key_log_weight is None else key_log_weight.contiguous()


def scale_of(q, softmax_scale) -> float:
    return q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale


def strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:2]]
