"""One decoding step through a stack of transformer blocks: `transformer_step_` and its reference.

    x += proj attn(norm(x) qkv)                 causal, over the cache that this step's k and v are appended to
    x += cross_proj attn(norm(x) cross_q)       over a fixed context, in stacks that have one
    x += w2 (silu(w1 norm(x)) * w3 norm(x))

norm is the RMS norm, attention has the scale 1 / sqrt(head_dim), linear layers have no bias. At a few rows a block's
arithmetic may take less time than calling its eight ops one by one from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from . import checks, legacy
from .decode import check_caches, decode_attention, decode_attention_ref, kv_append_, kv_append_ref_
from .linear import MAX_ROWS, skinny_linear, skinny_linear_ref
from .norm import rms_norm, rms_norm_ref

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
        d, hidden = self.width, self._tensor("w2", block.w2).shape[-1]
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

    It equals its parts (`rms_norm`, `skinny_linear`, `kv_append_`, `decode_attention`) bit by bit. On the CPU it is one
    native call; on GPUs it launches the parts, for a CUDA graph to hold. No rows: no change.
    Raises TypeError or ValueError for a wrong dtype, device, shape or stride; a cache_len outside 1 .. max_len or a
    cross_len outside 0 .. c raises ValueError on the CPU and is not looked for elsewhere. RuntimeError where autograd
    would need a gradient.
    """
    _check(x, weights, k_cache, v_cache, cache_len, cross, cross_len)
    pairs = [] if cross is None else [tensor for pair in cross for tensor in pair]
    arguments = (weights.norms, weights.weights, weights.scales, pairs, cross_len, checks.at_least("eps", eps, 0))
    _step_op(x, k_cache, v_cache, cache_len, *arguments)


def transformer_step_ref_(x, weights, k_cache, v_cache, cache_len, *, cross=None, cross_len=None, eps=1e-6) -> None:
    """The specification of `transformer_step_`, made of the references of its parts; float64 stays float64."""
    pairs = [] if cross is None else [tensor for pair in cross for tensor in pair]
    arguments = (weights.norms, weights.weights, weights.scales, pairs, cross_len, eps)
    REFERENCES.step(x, k_cache, v_cache, cache_len, *arguments)


class Parts(NamedTuple):
    """The ops that a step is made of, or their references."""

    rms_norm: Callable
    skinny_linear: Callable
    kv_append_: Callable
    decode_attention: Callable

    def step(self, x, k_cache, v_cache, cache_len, norms, weights, scales, cross, cross_len, eps):
        norms, cross, heads = iter(norms), iter(cross), k_cache.shape[2]
        matrices = iter(zip(weights, scales or [None] * len(weights), strict=True))

        def normed(y):
            return self.rms_norm(y, next(norms)[0], eps=eps)

        def linear(y, **options):
            weight, scale = next(matrices)
            return self.skinny_linear(y, weight, weight_scale=scale, **options)

        y = x
        for k, v in zip(k_cache, v_cache, strict=True):
            q = self.kv_append_(linear(normed(y))[:, None], k, v, cache_len, heads=heads)
            y = linear(self.decode_attention(q, k, v, cache_len).flatten(1), residual=y)
            if cross_len is not None:
                contexts = len(cross_len)
                q = linear(normed(y)).view(len(x) // contexts, contexts, heads, -1).transpose(0, 1)
                out = self.decode_attention(q, next(cross), next(cross), cross_len, causal=False)
                y = linear(out.transpose(0, 1).reshape(x.shape), residual=y)
            y = linear(linear(normed(y), activation="swiglu"), residual=y)
        x.copy_(y)


REFERENCES = Parts(rms_norm_ref, skinny_linear_ref, kv_append_ref_, decode_attention_ref)
OPS = Parts(rms_norm, skinny_linear, kv_append_, decode_attention)


# validation


def _check(x, weights, k_cache, v_cache, cache_len, cross, cross_len):
    checks.tensor("x", x, checks.FLOATS, 2)
    if not isinstance(weights, StackWeights):
        checks.reject("weights", "be StackWeights", type(weights).__name__, TypeError)
    if x.dtype != weights.like.dtype or x.device != weights.like.device:
        have = f"{checks.short(weights.like.dtype)} on {weights.like.device}"
        checks.reject("x", f"be {have} like the weights", f"{checks.short(x.dtype)} on {x.device}")
    rows = x.shape[0]
    checks.shape("x", x, (rows, weights.width))
    if rows > MAX_ROWS:
        checks.reject("x", f"have at most {MAX_ROWS} rows", rows)
    if not x.is_contiguous():
        checks.reject("x", "be contiguous", f"strides {x.stride()}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(name, cache, (x.dtype,), 5)
        if cache.shape[0] != weights.layers or cache.shape[2] * cache.shape[4] != weights.width:
            expected = f"have {weights.layers} layers, and heads * head_dim = {weights.width}"
            checks.reject(name, expected, list(cache.shape))
    check_caches(k_cache[0], v_cache[0], cache_len, "x", x, k_cache.shape[4])
    _check_cross(x, weights, k_cache, cross, cross_len)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, k_cache, v_cache, *weights.weights)):
        raise RuntimeError("transformer_step_ has no gradient: call it under torch.no_grad()")


def _check_cross(x, weights, k_cache, cross, cross_len):
    if (cross is not None, cross_len is not None) != (weights.cross, weights.cross):
        must = "be given together" if weights.cross else "be None: the weights have no cross_q"
        given = [name for name, value in (("cross", cross), ("cross_len", cross_len)) if value is not None]
        checks.reject("cross and cross_len", must, " and ".join(given) or "neither")
    if cross is None:
        return
    if len(cross) != weights.layers:
        checks.reject("cross", f"have one pair for each of {weights.layers} layers", len(cross))
    contexts = cross_len.shape[0] if cross_len.dim() else 0
    if contexts == 0 or x.shape[0] % contexts:
        checks.reject("cross_len", f"have as many entries as divide {x.shape[0]} rows", list(cross_len.shape))
    for k, v in cross:
        check_caches(k, v, cross_len, "x", x[:contexts], k_cache.shape[4])
        if k.shape[1] != k_cache.shape[2]:
            checks.reject("cross", f"have {k_cache.shape[2]} heads like k_cache", k.shape[1])


# the op


def _step_impl(x, k_cache, v_cache, cache_len, norms, weights, scales, cross, cross_len, eps):
    if x.numel() == 0:
        return
    checks.in_range("cache_len", cache_len, 1, k_cache.shape[3])
    if cross_len is not None:
        checks.in_range("cross_len", cross_len, 0, min(k.shape[2] for k in cross))
        cross_len = cross_len.contiguous()
    legacy.launch(
        "transformer_step", x, k_cache, v_cache, cache_len.contiguous(), norms, weights, scales, cross, cross_len, eps
    )


_step_op = legacy.define(
    "transformer_step_",
    "(Tensor(a!) x, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor cache_len, Tensor[] norms, Tensor[] weights, "
    "Tensor[] scales, Tensor[] cross, Tensor? cross_len, float eps) -> ()",
    _step_impl,
    lambda *_: None,
)


# backends: each works in place


def transformer_step_native(*args):
    torch.ops.flexkernels_native.transformer_step_(*args)


legacy.register("transformer_step", "reference", REFERENCES.step)
legacy.register("transformer_step", "cpu", transformer_step_native)
# launches one by one, which a CUDA graph makes cheap
legacy.register("transformer_step", "triton", OPS.step)
legacy.register("transformer_step", "cuda", OPS.step)
