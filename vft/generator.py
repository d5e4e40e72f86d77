"""The class- or text-conditional autoregressive transformer over time-first token sequences.

Flat position i holds register i // T of frame i % T, so k registers a frame are the first T * k positions. Input 0 is
``sos`` (+ the class embedding), input i is token i - 1; input i predicts token i.

    x += attn(n1(x)); x += xattn(nx(x), caption); x += w2(silu(w1 n2(x)) * w3 n2(x)); logits = head(norm(x))
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

import flexkernels
from flexkernels import decode_attention, kv_append_, rms_norm, sample_logits, skinny_linear, swiglu, transformer_step_

from . import checkpoint, codebook, decoding, generation
from .conditions import check_conditions, class_index
from .config import GeneratorConfig, parse_generator_config
from .fingerprint import TokensWarning
from .tokens import VideoTokens

# rows that skinny_linear serves
SKINNY_ROWS = 16
WEIGHTS = (None, "int8")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, float32 inside, eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, eps=1e-6)


class Linear(nn.Module):
    """x ``[m, k]`` -> x W^T ``[m, n]``; after :meth:`quantize`, W is int8 with one float32 scale an output."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.register_buffer("scale", None, persistent=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, activation: str | None = None):
        if len(x) <= SKINNY_ROWS and not torch.is_grad_enabled():
            return skinny_linear(
                x, self.weight, self.bias, residual=residual, activation=activation, weight_scale=self.scale
            )
        weight = self.weight if self.scale is None else (self.weight * self.scale[:, None]).to(x.dtype)
        out = F.linear(x, weight, self.bias)
        out = swiglu(out) if activation == "swiglu" else out
        return out if residual is None else residual + out

    def matrix(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """W, or the pair of int8 and scale."""
        return self.weight if self.scale is None else (self.weight, self.scale)

    def quantize(self) -> None:
        """W = round(W / scale) as int8 with scale = max |W| / 127 for each output."""
        weight = self.weight.detach().float()
        del self.weight
        self.scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.register_buffer("weight", (weight / self.scale[:, None]).round_().to(torch.int8))


class CrossAttention(nn.Module):
    """Attention to a caption's embeddings, whose keys and values are made once."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.width, config.width)
        self.kv = Linear(config.width, 2 * config.width)
        self.proj = Linear(config.width, config.width)

    def keys_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """context ``[contexts, c, width]`` -> k and v ``[contexts, heads, c, head_dim]``."""
        kv = self.kv(context.flatten(0, 1)).view(*context.shape[:2], 2, -1, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return k, v

    def packed(self, x, residual, k, v, context_len, lengths: Sequence[int]) -> torch.Tensor:
        """Sequence i of the packed x ``[total, width]`` sees the first context_len[i] keys of k[i], v[i]."""
        q = nn.utils.rnn.pad_sequence(self.q(x).unflatten(-1, (-1, self.head_dim)).split(lengths), batch_first=True)
        seen = torch.arange(k.shape[2], device=x.device) < context_len[:, None]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen[:, None, None])
        out = out.transpose(1, 2).flatten(2)
        return self.proj(torch.cat([rows[:n] for rows, n in zip(out, lengths, strict=True)]), residual)

    def step(self, x, residual, k, v, context_len) -> torch.Tensor:
        """x ``[rows, width]``; k, v ``[contexts, heads, c, head_dim]``: row i sees context i % contexts."""
        rows, contexts = len(x), len(k)
        q = self.q(x).view(rows // contexts, contexts, -1, self.head_dim).transpose(0, 1)
        out = decode_attention(q, k, v, context_len, causal=False)
        return self.proj(out.transpose(0, 1).reshape(rows, -1), residual)


class SelfAttention(nn.Module):
    """Causal self-attention with a merged qkv projection."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def packed(self, x, residual, layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed x ``[total, width]`` -> residual + out, and k, v ``[total, heads, head_dim]`` for a cache."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(1)
        return self.proj(flexkernels.attention(q, k, v, layout).flatten(1), residual), k, v

    def step(self, x, residual, k_cache, v_cache, length) -> torch.Tensor:
        """One token a row: x ``[rows, width]``, caches ``[rows, heads, max_len, head_dim]``, length with this token."""
        q = kv_append_(self.qkv(x)[:, None], k_cache, v_cache, length, heads=self.heads)
        return self.proj(decode_attention(q, k_cache, v_cache, length).view(len(x), -1), residual)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x); ``w13`` holds the rows of w1, then those of w3."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.w13 = Linear(config.width, 2 * config.hidden)
        self.w2 = Linear(config.hidden, config.width)

    def forward(self, x, residual) -> torch.Tensor:
        return self.w2(self.w13(x, activation="swiglu"), residual)


class Block(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.n1, self.attn = RMSNorm(config.width), SelfAttention(config)
        text = config.cond == "text"
        self.nx, self.xattn = (RMSNorm(config.width), CrossAttention(config)) if text else (None, None)
        self.n2, self.ffn = RMSNorm(config.width), FeedForward(config)

    def weights(self) -> flexkernels.BlockWeights:
        cross = {}
        if self.xattn is not None:
            cross = dict(norm_cross=self.nx.weight, cross_q=self.xattn.q.matrix(), cross_proj=self.xattn.proj.matrix())
        return flexkernels.BlockWeights(
            norm_attn=self.n1.weight, qkv=self.attn.qkv.matrix(), proj=self.attn.proj.matrix(),
            norm_mlp=self.n2.weight, w13=self.ffn.w13.matrix(), w2=self.ffn.w2.matrix(), **cross,
        )  # fmt: skip

    def packed(self, x, layout, lengths, cross) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed x ``[total, width]`` -> x, and this block's k and v; cross: (k, v, context_len), one a sequence."""
        x, k, v = self.attn.packed(self.n1(x), x, layout)
        if cross is not None:
            x = self.xattn.packed(self.nx(x), x, *cross, lengths)
        return self.ffn(self.n2(x), x), k, v

    def step(self, x, cache, length, cross) -> torch.Tensor:
        """One token a row; cache: (k, v); cross: (k, v, context_len) of the contexts."""
        x = self.attn.step(self.n1(x), x, *cache, length)
        if cross is not None:
            x = self.xattn.step(self.nx(x), x, *cross)
        return self.ffn(self.n2(x), x)


class Generator(nn.Module):
    """Generates token ids int64 ``[n, T, k]`` for a tokenizer to decode. Make one with :meth:`from_pretrained`.

    ``config`` holds the sizes; ``classes`` the class names (empty where the checkpoint has none); ``tokenizer`` the
    reference of the tokenizer whose ids it was trained on; ``recompute`` whether a block keeps its inputs alone for the
    backward pass of training.
    """

    recompute = False

    def __init__(self, config: GeneratorConfig, name: str = "generator") -> None:
        super().__init__()
        width = config.width
        self.config, self.name = config, name
        self.tok_emb = nn.Embedding(config.vocab, width)
        self.pos_emb = nn.Parameter(torch.empty(config.seq_len + 1, width))
        self.sos = nn.Parameter(torch.empty(width))
        self.cls_emb = nn.Embedding(config.n_classes + 1, width) if config.cond == "class" else None
        self.ctx_in = Linear(config.ctx_dim, width) if config.cond == "text" else None
        self.ctx_null = nn.Parameter(torch.empty(config.n_ctx_null, width)) if config.cond == "text" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(width)
        self.head = Linear(width, config.vocab, config.head_bias)
        for table in (self.tok_emb.weight, self.pos_emb, self.sos, self.cls_emb and self.cls_emb.weight, self.ctx_null):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    @classmethod
    def from_pretrained(
        cls,
        reference: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        weights: str | None = None,
        check_finite: bool = True,
    ) -> Generator:
        """Loads ``"tiny"``, a directory, a safetensors file, or a hub id ``"org/repo[@revision][/subdirectory]"``.

        ``weights="int8"`` keeps the matrices as int8 with one scale an output row: half the bytes of bfloat16, at a
        small error (see the tests); embeddings and norms stay in ``dtype``. ``check_finite=False`` loads weights that
        are NaN or infinite, and does not look for them.

        Raises:
            CheckpointError, ConfigError (both ValueError): the checkpoint is missing, damaged, or does not fit.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be None or 'int8', got {weights!r}")
        raw, tensors, name = checkpoint.read(reference, checkpoint.GENERATOR)
        raw, tensors = codebook.expand(raw, tensors)
        model = cls(parse_generator_config(raw), name)
        checkpoint.fill(model.published(), tensors, check_finite)
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return model.quantize() if weights == "int8" else model

    def published(self) -> dict[str, torch.Tensor]:
        """Parameters under the published names; merged ones as views."""
        tensors = {}
        for name, parameter in self.named_parameters():
            if ".w13." in name:
                w1, w3 = parameter.detach().chunk(2)
                tensors |= {name.replace("w13", "w1"): w1, name.replace("w13", "w3"): w3}
            else:
                tensors[name] = parameter.detach()
        return tensors

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Writes one safetensors file that :meth:`from_pretrained` reads, under the published names.

        Raises ValueError for a model with int8 weights, which are rounded.
        """
        if self.head.scale is not None:
            raise ValueError("a model with int8 weights cannot be saved: save the one it was made from")
        checkpoint.write_tensors(path, self.published(), self.config.raw, dtype)

    def quantize(self) -> Generator:
        """Turns the weight matrices into int8, in place; see :meth:`from_pretrained`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantize()
        return self

    @property
    def device(self) -> torch.device:
        return self.sos.device

    @property
    def classes(self) -> tuple[str, ...]:
        return self.config.classes

    @property
    def tokenizer(self) -> str | None:
        return self.config.tokenizer

    def class_index(self, name: str) -> int:
        """The index of a class name. Raises ValueError that suggests near names and lists the classes."""
        return class_index(self.classes, name)

    @torch.no_grad()
    def logits(
        self,
        flat_ids: torch.Tensor,
        class_id: int | str | Sequence | torch.Tensor | None = None,
        text_emb: torch.Tensor | Sequence[torch.Tensor] | None = None,
        text_mask: torch.Tensor | None = None,
        unconditional: bool = False,
    ) -> torch.Tensor:
        """Teacher-forced logits, float32 ``[n, L, vocab]``: entry (r, i) predicts flat_ids[r, i] from those before it.

        Args:
            flat_ids: int ``[n, L]`` in time-first order, L at most ``seq_len``; the last id is not looked at.
            class_id, text_emb, text_mask: as in :meth:`stream`, one for all rows or one a row.
            unconditional: the null class or caption instead.

        Empty flat_ids give empty logits. Raises TypeError or ValueError for wrong arguments.
        """
        flat_ids = self._check_flat_ids(flat_ids)
        n, length = flat_ids.shape
        if unconditional:
            if any(given is not None for given in (class_id, text_emb, text_mask)):
                raise ValueError("class_id and text_emb must not be given with unconditional=True")
            rows = [None] * n
        else:
            rows = self.conditions(class_id, text_emb, text_mask, n)
        if flat_ids.numel() == 0:
            return torch.zeros(n, length, self.config.vocab, device=self.device)
        return self.teacher_forced(flat_ids, rows)

    def teacher_forced(self, flat_ids: torch.Tensor, conditions: list) -> torch.Tensor:
        """:meth:`logits` with gradients, for conditions as :meth:`conditions` gives them, unchecked."""
        n, length = flat_ids.shape
        x = self.packed(list(flat_ids[:, :-1]), self.starts(conditions), self.cross(conditions))
        return self.head(x).float().view(n, length, -1)

    def packed(self, ids: list[torch.Tensor], starts, cross, keep=None) -> torch.Tensor:
        """Normed outputs ``[sum(len + 1), width]`` of sequences ``start, ids`` in one packed causal pass.

        starts ``[n, width]``; cross: (k, v, context_len) a block, or None; keep(layer, k, v) receives what a cache
        needs.
        """
        lengths = [len(i) + 1 for i in ids]
        layout = flexkernels.SequenceLayout.from_lengths(lengths, "causal", self.device)
        first = layout.cu_seqlens[:-1].long()
        x = self.tok_emb(torch.cat([F.pad(i, (1, 0)) for i in ids])).index_copy(0, first, starts)
        x = x + torch.cat([self.pos_emb[:n] for n in lengths])
        for layer, (block, context) in enumerate(zip(self.blocks, cross, strict=True)):
            if self.recompute:
                x, k, v = recomputed(block.packed, x, layout, lengths, context, use_reentrant=False)
            else:
                x, k, v = block.packed(x, layout, lengths, context)
            if keep is not None:
                keep(layer, k, v)
        return self.norm(x)

    def starts(self, conditions: list) -> torch.Tensor:
        """Input 0 of each condition, ``[n, width]``."""
        if self.cls_emb is None:
            return self.sos.expand(len(conditions), -1)
        classes = [self.config.n_classes if c is None else c for c in conditions]
        return self.sos + self.cls_emb(torch.tensor(classes, device=self.device))

    def cross(self, conditions: list) -> list:
        """(k, v, context_len) of the conditions for each block, k and v ``[n, heads, c, head_dim]``; Nones without
        text."""
        if self.ctx_in is None:
            return [None] * len(self.blocks)
        rows = [self.ctx_null if c is None else self.ctx_in(c) for c in conditions]
        context_len = torch.tensor([len(r) for r in rows], dtype=torch.int32, device=self.device)
        context = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return [(*block.xattn.keys_values(context), context_len) for block in self.blocks]

    def stack(self) -> flexkernels.StackWeights:
        """The blocks' weights as :func:`flexkernels.transformer_step_` takes them; they are not copied."""
        return flexkernels.StackWeights([block.weights() for block in self.blocks])

    def step(self, state: decoding.State, samples: int, limit: int) -> None:
        """Draws the next token of the first ``samples`` samples, in place; ``limit`` bounds the cache that is read.

        Nothing here looks at a value on the host, so that a CUDA graph can hold it.
        """
        view = state.view(samples, limit)
        x = F.embedding(view.ids, self.tok_emb.weight) + F.embedding(view.position, self.pos_emb)
        view.length.add_(1)
        in_one_call = x.device.type == "cpu" or flexkernels.prefers_persistent_step()
        if in_one_call and len(x) <= SKINNY_ROWS:
            cross = (
                None if self.ctx_in is None else {"cross": [c[:2] for c in view.cross], "cross_len": view.cross[0][2]}
            )
            transformer_step_(x, state.stack, view.k, view.v, view.length, **cross or {})
        else:
            x = self.blocks_step(x, view)
        self.draw(self.norm(x), view, state.sampler)

    def blocks_step(self, x: torch.Tensor, view: decoding.View) -> torch.Tensor:
        """x ``[rows, width]`` through all blocks, op by op: for a CUDA graph, and above ``SKINNY_ROWS`` rows."""
        for block, *cache, cross in zip(self.blocks, view.k, view.v, view.cross, strict=True):
            x = block.step(x, cache, view.length, cross)
        return x

    def draw(self, x: torch.Tensor, view: decoding.View, sampler: dict) -> None:
        """Draws a token from the normed outputs x ``[rows, width]`` and makes it the next input."""
        logits = self.head(x)
        # the largest is NaN where any is
        view.nan.logical_or_(logits.amax(1).isnan())
        guided = len(view.ids) > len(view.offset)
        uncond = logits[1::2] if guided else None
        cond = logits[::2] if guided else logits
        ids = sample_logits(cond, uncond_logits=uncond, seed=view.seed, offset=view.offset, **sampler)
        view.out.scatter_(1, view.next[:, None], ids[:, None])
        view.ids.view(len(ids), -1).copy_(ids[:, None])
        view.position.add_(1)
        view.offset.add_(1)

    def stream(
        self, class_id=None, text_emb=None, text_mask=None, *, n=None, frames=5, tokens_per_frame=None, temperature=1.0,
        top_k=None, top_p=None, min_p=None, guidance=None, seed=0, prompt=None, cuda_graph=None,
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        """Yields ids int64 ``[n, frames, levels]`` whenever all rows have one more register level, coarse to fine.

        Each yield holds every level so far, so that it can be decoded at once; the last equals :meth:`generate`'s.
        Arguments are checked before this returns.

        Args:
            class_id: class models: an index or a class name, or a sequence or int tensor of n of them.
            text_emb: text models: caption embeddings ``[n, c, ctx_dim]``, ``[c, ctx_dim]`` or a list of the latter.
            text_mask: ``[n, c]`` bool or 0/1, false for padding (default: all true); a row without a true entry is one
                without a caption.
            n: rows; defaults to the number of classes or captions given; one class or caption serves any n.
            frames: T, latent frames (default 5: a clip of 17 frames).
            tokens_per_frame: k, any prefix of the registers (default: what a frame had in training, or less where that
                does not fit into ``seq_len``); a list of n ints stops each row at its own, and pads the ids with -1.
            temperature: 0 takes the most likely token. top_k, top_p in (0, 1], min_p in [0, 1): filters in this order.
            guidance: l_u + guidance (l_c - l_u) on the logits; None or 1 is off.
            seed: the draw of row r at position i depends on (seed, r, i) alone.
            prompt: given first tokens, time-first: int ``[p]`` for all rows, ``[n, p]``, or a list of n int ``[p_r]``.
            cuda_graph: replay the step as a CUDA graph, one for each cache length bucket; None: on a GPU.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or range; more tokens than ``seq_len``. ValueError
                where logits are NaN, by the last yield at the latest: on a GPU nothing is read before.
        """
        rows = self.conditions(class_id, text_emb, text_mask, n)
        sampling = decoding.Sampling(temperature, top_k, top_p, min_p, guidance, seed)
        request = decoding.Request.checked(
            self.config, rows, frames=frames, tokens_per_frame=tokens_per_frame, prompt=prompt, guided=sampling.guided
        )
        if frames > self.config.trained_frames:
            warnings.warn(
                f"frames {frames} are more than the {self.config.trained_frames} that the generator was trained on: "
                f"{request.levels} tokens a frame",
                TokensWarning,
                stacklevel=2,
            )
        if cuda_graph and self.device.type != "cuda":
            raise ValueError(f"cuda_graph must be off on {self.device}")
        return decoding.levels(self, request, sampling, cuda_graph)

    def generate(self, *condition, **options) -> torch.Tensor:
        """Generates ids, int64 ``[n, frames, tokens_per_frame]`` on the model's device; arguments: :meth:`stream`'s."""
        *_, ids = self.stream(*condition, **options)
        return ids.contiguous()

    def generate_tokens(
        self, tokenizer, *condition, fps: float = 8.0, size: int | None = None, **options
    ) -> list[VideoTokens]:
        """Generates :class:`vft.VideoTokens`, one a row, for ``tokenizer.decode``.

        Args:
            tokenizer: the :class:`vft.Tokenizer` that will decode them.
            fps: frames a second that the video says.
            size: its side in pixels where the tokenizer has no working size (default: 256).
            condition, options: :meth:`stream`'s; tokens_per_frame is one int, at most the tokenizer's registers.

        Raises:
            TypeError, ValueError: as :meth:`stream`; the tokenizer is another than that of training.
        """
        return generation.tokens(self, tokenizer, *condition, fps=fps, size=size, **options)

    # shown by help() and editors
    generate.__signature__ = inspect.signature(stream).replace(return_annotation="torch.Tensor")

    def memory(
        self, n: int, frames: int, tokens_per_frame: int, *, guidance: bool = True, text_len: int = 0
    ) -> dict[str, int]:
        """Bytes that :meth:`generate` holds, by part: weights, cache, text cache, logits, and total.

        ``text_len`` is the longest caption's length; captions are counted as n different ones.
        """
        config, rows = self.config, n * (2 if guidance else 1)
        element = self.sos.element_size()
        text = max(text_len, config.n_ctx_null) if self.ctx_in is not None else 0
        parts = {
            "weights": sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers())),
            "cache": 2 * config.depth * rows * config.width * frames * tokens_per_frame * element,
            "text_cache": 2 * config.depth * rows * config.width * text * element,
            "logits": rows * config.vocab * element,
        }
        return parts | {"total": sum(parts.values())}

    def conditions(self, class_id, text_emb, text_mask, n: int | None) -> list:
        """One condition a row, see :func:`vft.conditions.check_conditions`."""
        return check_conditions(self.config, class_id, text_emb, text_mask, n, self.sos)

    def _check_flat_ids(self, ids: torch.Tensor) -> torch.Tensor:
        config = self.config
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"flat_ids must be int64 or int32, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.dim() != 2 or ids.shape[1] > config.seq_len:
            raise ValueError(f"flat_ids must have shape [n, L] with L <= {config.seq_len}, got {list(ids.shape)}")
        if ids.numel():
            decoding.check_range("flat_ids", ids, config.vocab)
        return ids.to(self.device).long()


def time_first(ids: torch.Tensor) -> torch.Tensor:
    """ids ``[..., T, k]`` -> flat time-first order ``[..., T * k]``: position i is register i // T of frame i % T."""
    return ids.transpose(-1, -2).flatten(-2)
