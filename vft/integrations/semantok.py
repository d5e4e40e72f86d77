"""SemanTok's published autoregressive transformer (Stability-AI/SemanTok), found by its structure.

Replaced is ``sample``: ``vft``'s decoding with fused kernels runs over the model's weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexkernels.integrations import Change

from .. import decoding
from ..config import GeneratorConfig, parse_generator_config
from ..generator import Generator
from .engine import replace_attribute

PARTS = ("tok_emb", "pos_emb", "sos", "cls_emb", "ctx_in", "ctx_null", "blocks", "norm", "head", "sample")
HEAD_DIM, NORM_EPS = 64, 1e-6


def knows(model: Any) -> bool:
    if not isinstance(model, nn.Module) or not all(hasattr(model, name) for name in PARTS) or not len(model.blocks):
        return False
    block = model.blocks[0]
    return all(hasattr(block, name) for name in ("n1", "attn", "xattn", "n2", "ffn")) and hasattr(block.attn, "qkv")


def accelerate(model: Any, *, dtype: torch.dtype | None = None, cuda_graph: bool | None = None) -> Change:
    """``sample`` draws by ``vft.Generator``'s decoding.

    Args:
        dtype: None computes in the weights' dtype without a second copy, whatever dtype ``sample`` is given; another
            dtype computes over a copy cast to it. Autocast has no effect inside.
        cuda_graph: replay the step as a CUDA graph; None: on a GPU.

    Raises ValueError for a model that a generator's configuration cannot say.
    """
    sampler = Sampler(model, dtype, cuda_graph)
    sampler.install()
    # the sampler lives as long as the model; a strong reference here would keep the model alive for ever
    remove = weakref.WeakMethod(sampler.remove)
    return Change(["sample"], [], lambda: remove()())


class Sampler:
    """Stands in for the model's ``sample``, over a ``vft.Generator`` that has the model's own Parameter objects.

    The matrices w1 and w3 of a gated MLP lie side by side in the generator's w13; the model's become views of it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, cuda_graph: bool | None) -> None:
        self.cuda_graph = cuda_graph
        with torch.device("meta"):
            self.generator = Generator(_config(model), type(model).__name__).eval()
        check(self.generator, model)
        self.model = model
        self.dtype = model.sos.dtype if dtype is None else dtype
        self.shared = self.dtype == model.sos.dtype
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        if self.shared:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    self._undo.append(lambda p=parameter: p.requires_grad_(True))
                    parameter.requires_grad_(False)
        adopt(self.generator, self.model, self.dtype, self.shared)
        if self.shared:
            self._undo.append(self._separate)
        self._undo.append(replace_attribute(self.model, "sample", self.sample))

    def __getstate__(self) -> dict[str, Any]:
        # a copy or pickle samples as this one; what it was before stays with this one
        return vars(self) | {"_undo": []}

    def remove(self) -> None:
        """Undoes :meth:`install`: every weight is bitwise what it was, in memory of its own."""
        while self._undo:
            self._undo.pop()()

    def _separate(self) -> None:
        for block in self.model.blocks:
            for linear in (block.ffn.w1, block.ffn.w3):
                linear.weight.data = linear.weight.data.clone()

    @torch.no_grad()
    def sample(
        self, n, length=None, class_id=None, text_emb=None, text_mask=None, temperature=1.0, top_k=0, top_p=1.0,
        cfg=1.0, device="cuda", generator=None, dtype=torch.bfloat16,
    ):  # fmt: skip
        """The published arguments -> int64 ``[n, length]``; see the docs for `generator`, `device` and `dtype`.

        At temperature 0 the ids are the published ones; else they are other draws from the same distribution, seeded by
        one number from `generator`.
        """
        model = self._prepared()
        length = length or model.config.seq_len
        conditions = self._conditions(model, n, class_id, text_emb, text_mask)
        seed = 0 if temperature <= 0 else int(torch.randint(2**62, (), generator=generator, device=_home(generator)))
        sampling = decoding.Sampling(
            max(temperature, 0.0), top_k or None, top_p if top_p < 1 else None, guidance=cfg, seed=seed
        )
        request = decoding.Request.checked(
            model.config, conditions, frames=length, tokens_per_frame=1, prompt=None, guided=sampling.guided
        )
        with torch.autocast(model.device.type, enabled=False):
            *_, ids = decoding.levels(model, request, sampling, self.cuda_graph)
        return ids.reshape(n, length)

    def _prepared(self):
        # weights that somebody else moved or cast have left the joined memory
        if self.shared:
            theirs, ours = self.model.blocks[0].ffn.w1.weight, self.generator.blocks[0].ffn.w13.weight
            if theirs.data_ptr() != ours.data_ptr():
                adopt(self.generator, self.model, theirs.dtype, shared=True)
        return self.generator

    def _conditions(self, model, n: int, class_id, text_emb, text_mask) -> list:
        if model.cls_emb is None:
            return [None] * n if text_emb is None else model.conditions(None, text_emb, text_mask, n)
        if class_id is None:
            return [None] * n
        null = model.config.n_classes
        ids = [int(i) for i in class_id]
        if len(ids) != n or not all(0 <= i <= null for i in ids):
            raise ValueError(f"class_id must hold n = {n} ids in 0..{null}, got {ids}")
        return [None if i == null else i for i in ids]


def published_names(name: str) -> list[str]:
    """The published names of one of the generator's parameters, in the order of its rows."""
    return [name.replace("w13", w) for w in ("w1", "w3")] if ".w13." in name else [name]


def check(generator, model: nn.Module) -> None:
    """Raises ValueError naming a parameter of the model that is missing or has another shape."""
    theirs = dict(model.named_parameters())
    for name, wanted in generator.named_parameters():
        names = published_names(name)
        shape = [len(wanted) // len(names), *wanted.shape[1:]]
        for published in names:
            got = list(theirs[published].shape) if published in theirs else "none"
            if got != shape:
                raise ValueError(f"{published} must have shape {shape}, got {got}")


def adopt(generator, model: nn.Module, dtype: torch.dtype, shared: bool) -> None:
    """Gives the generator the model's Parameter objects, and both the joined w1 and w3; not shared, copies of them."""
    theirs = dict(model.named_parameters())
    for name in [name for name, _ in generator.named_parameters()]:
        given = [theirs[published] for published in published_names(name)]
        parameter = given[0]
        if len(given) > 1:
            parameter = nn.Parameter(torch.cat([p.detach().to(dtype) for p in given]), requires_grad=False)
        elif not shared:
            parameter = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        if shared and len(given) > 1:
            for p, rows in zip(given, parameter.data.chunk(2), strict=True):
                p.data = rows
        owner, _, leaf = name.rpartition(".")
        setattr(generator.get_submodule(owner), leaf, parameter)


def _config(model: nn.Module) -> GeneratorConfig:
    block = model.blocks[0]
    classes = 0 if model.cls_emb is None else model.cls_emb.num_embeddings - 1
    text = model.ctx_in is not None
    if text == (classes > 0):
        raise ValueError("the model must be conditioned on either classes or text")
    norms = [block.n1, block.n2, model.norm, *((block.nx,) if text else ())]
    if any(norm.eps != NORM_EPS for norm in norms) or block.attn.hd != HEAD_DIM:
        raise ValueError(f"the model must have norms of eps {NORM_EPS} and heads of {HEAD_DIM}")
    return parse_generator_config({
        "depth": len(model.blocks), "vocab": model.tok_emb.num_embeddings, "seq_len": model.pos_emb.shape[0] - 1,
        "cond": "text" if text else "class", "n_classes": classes,
        "ctx_dim": model.ctx_in.in_features if text else 0, "n_ctx_null": model.ctx_null.shape[0] if text else 0,
        "head_bias": model.head.bias is not None,
    })  # fmt: skip


def _home(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
