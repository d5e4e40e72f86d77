"""One decoding step through a stack of transformer blocks: `transformer_step_` and its reference.

    x += proj attn(norm(x) qkv)                 causal, over the cache that this step's k and v are appended to
    x += cross_proj attn(norm(x) cross_q)       over a fixed context, in stacks that have one
    x += w2 (silu(w1 norm(x)) * w3 norm(x))

norm is the RMS norm, attention has the scale 1 / sqrt(head_dim), linear layers have no bias. At a few rows a block's
arithmetic may take less time than calling its eight ops one by one from Python.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from . import checks, library
from .decode import check_caches, decode_attention_ref, kv_append_ref_
from .linear import MAX_ROWS, skinny_linear_ref
from .norm import rms_norm_ref
from .transformer_parts import Parts

# 1: `persistent=None` means wherever the kernel serves the call; 0: nowhere; neither: where it has been timed
ENVIRONMENT = "FLEXKERNELS_PERSISTENT_STEP"
# width and hidden width of the stacks that it has been timed on
TIMED = 1024, 3072
Matrix = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """Weights of one block of width d: norms [d]; a matrix [n, k] of the norms' dtype, or (int8 [n, k], scale [n]).

    qkv: [3 d, d], the rows of q, then k, then v. proj, cross_q, cross_proj: [d, d]. w13: [2 h, d], the rows of w1, then
    those of w3. w2: [d, h]. norm_cross, cross_q and cross_proj are given together or not at all.
    """

    norm_attn: torch.Tensor
    qkv: Matrix
    proj: Matrix
    norm_mlp: torch.Tensor
    w13: Matrix
    w2: Matrix
    norm_cross: torch.Tensor | None = None
    cross_q: Matrix | None = None
    cross_proj: Matrix | None = None


class StackWeights:
    """The weights of all blocks, checked once; what `transformer_step_` takes.

    Raises TypeError or ValueError for a wrong dtype, shape or device, or blocks that differ in them.
    """

    def __init__(self, blocks: Sequence[BlockWeights]):
        if not blocks:
            checks.reject("blocks", "not be empty", list(blocks))
        first = blocks[0]
        checks.tensor("norm_attn", first.norm_attn, (*checks.FLOATS, torch.float64), 1)
        self.cross = first.norm_cross is not None
        self.int8 = isinstance(first.qkv, tuple)
        self.layers, (self.width,) = len(blocks), first.norm_attn.shape
        self.like = first.norm_attn
        self.hidden = self._tensor("w2", first.w2).shape[-1]
        self.norms, self.weights, self.scales = [], [], []
        for block in blocks:
            self._add(block)

    def _add(self, block: BlockWeights) -> None:
        names = [f.name for f in fields(block) if getattr(block, f.name) is not None]
        wanted = [f.name for f in fields(block) if self.cross or not f.name.count("cross")]
        if names != wanted:
            checks.reject("every block", f"have {', '.join(wanted)}", ", ".join(names))
        for name in ("norm_attn", "norm_cross", "norm_mlp") if self.cross else ("norm_attn", "norm_mlp"):
            norm = getattr(block, name)
            checks.tensor(name, norm, (self.like.dtype,))
            checks.like(name, norm, "norm_attn", self.like)
            # the row of a table, as the norm kernels take it
            self.norms.append(norm[None])
        d, hidden = self.width, self.hidden
        shapes = {"qkv": (3 * d, d), "proj": (d, d)}
        if self.cross:
            shapes |= {"cross_q": (d, d), "cross_proj": (d, d)}
        for name, shape in (shapes | {"w13": (2 * hidden, d), "w2": (d, hidden)}).items():
            self._add_matrix(name, getattr(block, name), shape)

    def _tensor(self, name: str, matrix: Matrix) -> torch.Tensor:
        if isinstance(matrix, tuple) != self.int8:
            kinds = "(int8, scale) pairs like the first" if self.int8 else "tensors like the first"
            checks.reject(name, f"be one of {kinds}", "a pair" if isinstance(matrix, tuple) else "a tensor", TypeError)
        weight = matrix[0] if self.int8 else matrix
        checks.tensor(name, weight, (torch.int8 if self.int8 else self.like.dtype,), 2)
        return weight

    def _add_matrix(self, name: str, matrix: Matrix, shape: tuple[int, int]) -> None:
        weight = self._tensor(name, matrix)
        checks.shape(name, weight, shape)
        checks.same_device(name, weight, "norm_attn", self.like)
        self.weights.append(weight.contiguous())
        if self.int8:
            checks.tensor(f"{name} scale", matrix[1], (torch.float32,))
            checks.shape(f"{name} scale", matrix[1], shape[:1])
            checks.same_device(f"{name} scale", matrix[1], "norm_attn", self.like)
            self.scales.append(matrix[1].contiguous())


def transformer_step_(
    x: torch.Tensor,
    weights: StackWeights,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    *,
    cross: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    cross_len: torch.Tensor | None = None,
    eps: float = 1e-6,
    persistent: bool | None = None,
) -> None:
    """The step above for the newest token of each row, in place on x and the caches; for inference, without a gradient.

    x: [rows, d] float32, bfloat16 or float16, contiguous, rows from 0 to 16; becomes the last block's result.
    weights: of the same d and dtype.
    k_cache, v_cache: [layers, rows, heads, max_len, head_dim] in x's dtype with heads * head_dim = d, any strides but
    the last, which is 1; position cache_len - 1 of each row is written.
    cache_len: int32 [rows], the valid keys of each row, this token's included.
    cross: one (k, v) a layer, each [contexts, heads, c, head_dim], where contexts divide rows and row i sees context
    i % contexts; cross_len: int32 [contexts], the valid keys of each. Both exactly where the weights have cross_q.
    eps: of the norms.
    persistent: whether one kernel does the whole step, on the CUDA backend: True where it must, False where it must
    not. None: where it can and `prefers_persistent_step(weights)`. `transformer_step_refusal` says where it can.

    In parts it equals `rms_norm`, `skinny_linear`, `kv_append_` and `decode_attention` on the same backend bit by bit.
    As one kernel it keeps the residual in float32 through all layers and rounds elsewhere; its bits do not depend on
    the other rows, and are the same on every run on one kind of GPU.
    No rows: no change.
    Raises TypeError or ValueError for a wrong dtype, device, shape or stride; a cache_len outside 1 .. max_len or a
    cross_len outside 0 .. c raises ValueError on the CPU and is not looked for elsewhere. RuntimeError where autograd
    would need a gradient, and where `persistent` is True and cannot be.
    """
    if persistent is None and isinstance(weights, StackWeights) and not prefers_persistent_step(weights):
        persistent = False
    _step_op(*_arguments(x, weights, k_cache, v_cache, cache_len, cross, cross_len), eps, persistent)


def transformer_step_refusal(
    x: torch.Tensor, weights: StackWeights, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_len: torch.Tensor, *,
    cross: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None, cross_len: torch.Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why `transformer_step_` of these arguments cannot be one kernel (`persistent=True`), or None where it can.

    The kernel takes bfloat16 and float16, 1 to 8 rows, widths up to 2,048 that are multiples of 64, hidden widths up
    to 6,144 that are multiples of 64, a head_dim of 64 or 128, and tensors that lie on 16 bytes, on GPUs of compute
    capability 9.0 whose multiprocessors have room for a block of it.
    Raises what `transformer_step_` does for wrong arguments.
    """
    arguments = _arguments(x, weights, k_cache, v_cache, cache_len, cross, cross_len)
    _check_transformer_step_(*arguments, 0.0, None)
    return _refusal(*arguments) or None


def prefers_persistent_step(weights: StackWeights) -> bool:
    """Whether a step of these weights is to be one kernel wherever it can be.

    By default for what has been timed, in bfloat16, and was faster: dense matrices of 16 bits, widths up to 1,024 and
    hidden widths up to 3,072. FLEXKERNELS_PERSISTENT_STEP=1: for all; 0: for none.
    """
    asked = os.environ.get(ENVIRONMENT)
    if asked in ("0", "1"):
        return asked == "1"
    small = weights.width <= TIMED[0] and weights.hidden <= TIMED[1]
    return small and not weights.int8 and weights.like.dtype in (torch.bfloat16, torch.float16)


def transformer_step_ref_(
    x: torch.Tensor, weights: StackWeights, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_len: torch.Tensor, *,
    cross: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None, cross_len: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:  # fmt: skip
    """The specification of `transformer_step_`, made of the references of its parts; float64 stays float64."""
    _REFERENCES.step(*_arguments(x, weights, k_cache, v_cache, cache_len, cross, cross_len), eps)


# validation


def _arguments(x, weights, k_cache, v_cache, cache_len, cross, cross_len):
    """The op's arguments before eps, which do not know what the weights are of."""
    if not isinstance(weights, StackWeights):
        checks.reject("weights", "be StackWeights", type(weights).__name__, TypeError)
    if (cross is not None, cross_len is not None) != (weights.cross, weights.cross):
        must = "be given together" if weights.cross else "be None: the weights have no cross_q"
        given = [name for name, value in (("cross", cross), ("cross_len", cross_len)) if value is not None]
        checks.reject("cross and cross_len", must, " and ".join(given) or "neither")
    pairs = [] if cross is None else [tensor for pair in cross for tensor in pair]
    lists = weights.norms, weights.weights, weights.scales, pairs
    return x, k_cache, v_cache, cache_len, *lists, cross_len


def _check_transformer_step_(
    x, k_cache, v_cache, cache_len, norms, weights, scales, cross, cross_len, eps, persistent=False
):
    checks.tensor("x", x, checks.FLOATS, 2)
    like, layers = norms[0], len(norms) // (2 if cross_len is None else 3)
    if x.dtype != like.dtype or x.device != like.device:
        have = f"{checks.short(like.dtype)} on {like.device}"
        checks.reject("x", f"be {have} like the weights", f"{checks.short(x.dtype)} on {x.device}")
    rows, width = x.shape[0], like.shape[1]
    checks.shape("x", x, (rows, width))
    if rows > MAX_ROWS:
        checks.reject("x", f"have at most {MAX_ROWS} rows", rows)
    if not x.is_contiguous():
        checks.reject("x", "be contiguous", f"strides {x.stride()}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(name, cache, (x.dtype,), 5)
        if cache.shape[0] != layers or cache.shape[2] * cache.shape[4] != width:
            checks.reject(name, f"have {layers} layers, and heads * head_dim = {width}", list(cache.shape))
    check_caches(k_cache[0], v_cache[0], cache_len, "x", x, k_cache.shape[4])
    _check_lengths("cache_len", cache_len, 1, k_cache.shape[3])
    if cross_len is not None:
        _check_contexts(x, k_cache, cross, cross_len, layers)
    checks.at_least("eps", eps, 0)


def _check_contexts(x, k_cache, cross, cross_len, layers):
    if len(cross) != 2 * layers:
        checks.reject("cross", f"have one pair for each of {layers} layers", len(cross) // 2)
    contexts = cross_len.shape[0] if cross_len.dim() else 0
    if contexts == 0 or x.shape[0] % contexts:
        checks.reject("cross_len", f"have as many entries as divide {x.shape[0]} rows", list(cross_len.shape))
    for k, v in zip(cross[::2], cross[1::2], strict=True):
        check_caches(k, v, cross_len, "x", x[:contexts], k_cache.shape[4])
        if k.shape[1] != k_cache.shape[2]:
            checks.reject("cross", f"have {k_cache.shape[2]} heads like k_cache", k.shape[1])
        _check_lengths("cross_len", cross_len, 0, k.shape[2])


def _check_lengths(name, lengths, low, high):
    # a trace has no values
    if not torch.compiler.is_compiling():
        checks.in_range(name, lengths, low, high)


# the op


_REFERENCES = Parts(
    norm=lambda x, weight, eps: rms_norm_ref(x, weight, eps=eps),
    linear=lambda x, weight, scale, residual, swiglu: skinny_linear_ref(
        x, weight, weight_scale=scale, residual=residual, activation="swiglu" if swiglu else None
    ),
    append=lambda qkv, k, v, cache_len, heads: kv_append_ref_(qkv, k, v, cache_len, heads=heads),
    attend=lambda q, k, v, cache_len, causal: decode_attention_ref(q, k, v, cache_len, causal=causal),
)


def _in_parts_only(*args):
    persistent = args[10:] == (True,)
    return "it has no kernel of a whole step, which persistent=True asks for" if persistent else None


_step_op = library.Op(
    "transformer_step_",
    "(Tensor(a!) x, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor cache_len, Tensor[] norms, Tensor[] weights, "
    "Tensor[] scales, Tensor[] cross, Tensor? cross_len, float eps, bool? persistent=False) -> ()",
    check=_check_transformer_step_,
    reference=_REFERENCES.step,
    fake=lambda *_: None,
    triton="transformer",
    unsupported={"triton": _in_parts_only, "reference": _in_parts_only},
    inference=True,
    jvp=None,
)
_refusal = library.Query(
    "transformer_step_refusal",
    "(Tensor x, Tensor k_cache, Tensor v_cache, Tensor cache_len, Tensor[] norms, Tensor[] weights, Tensor[] scales, "
    "Tensor[] cross, Tensor? cross_len) -> str",
)
