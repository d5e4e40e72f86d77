"""The class- or text-conditional autoregressive transformer over time-first token sequences.

Flat position i holds register i // T of frame i % T, so k registers a frame are the first T * k positions. Input 0 is
``sos`` (+ the class embedding), input i is token i - 1; input i predicts token i.

    x += attn(n1(x)); x += xattn(nx(x), caption); x += w2(silu(w1 n2(x)) * w3 n2(x)); logits = head(norm(x))
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

import flexkernels
from flexkernels import sample_logits, transformer_step_, transformer_step_refusal
from flexkernels.typed import called_as

from . import checkpoint, codebook, decoding, fp8, generation, speculation
from .conditions import check_conditions, class_index
from .config import GeneratorConfig, parse_generator_config
from .fingerprint import TokensWarning
from .fp8 import FP8
from .generator_layers import PARTS, SKINNY_ROWS, Block, Linear, RMSNorm, parts
from .layers import repeated
from .replay import Replays
from .session import TEXT_LEN, Session
from .tokens import VideoTokens

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

WEIGHTS = (None, "int8", "fp8")


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
        self.config, self.name, self.replays = config, name, Replays()
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
        small error (docs/models.md); embeddings and norms stay in ``dtype``. ``weights="fp8"`` keeps them as
        float8_e4m3fn and rounds what they are multiplied with to it too: for GPUs that multiply it, with ``dtype``
        bfloat16; elsewhere the same formula in ``dtype``, which saves memory and no time.
        ``check_finite=False`` loads weights that are NaN or infinite, and does not look for them.

        Raises:
            CheckpointError, ConfigError (both ValueError): the checkpoint is missing, damaged, or does not fit.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be None, 'int8' or 'fp8', got {weights!r}")
        if weights == "fp8":
            fp8.check_device(device)
        raw, tensors, name = checkpoint.read(reference, checkpoint.GENERATOR)
        raw, tensors = codebook.expand(raw, tensors)
        model = cls(parse_generator_config(raw), name)
        checkpoint.fill(model.published(), tensors, check_finite)
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return model if weights is None else model.quantize(weights)

    def published(self) -> dict[str, torch.Tensor]:
        """Parameters under the published names; merged ones as views."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.named_parameters():
            if ".w13." in name:
                w1, w3 = parameter.detach().chunk(2)
                tensors |= {name.replace("w13", "w1"): w1, name.replace("w13", "w3"): w3}
            else:
                tensors[name] = parameter.detach()
        return tensors

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Writes one safetensors file that :meth:`from_pretrained` reads, under the published names.

        Raises ValueError for a model with int8 or fp8 weights, which are rounded.
        """
        if self.head.scale is not None:
            kind = "int8" if self.head.weight.dtype == torch.int8 else "fp8"
            raise ValueError(f"a model with {kind} weights cannot be saved: save the one it was made from")
        checkpoint.write_tensors(path, self.published(), self.config.raw, dtype)

    def quantize(self, weights: str = "int8") -> Generator:
        """Turns the weight matrices into "int8" or "fp8", in place; see :meth:`from_pretrained`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantize(weights)
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
        x = self.tok_emb(torch.cat([F.pad(i, (1, 0)) for i in ids]))
        # under autocast the table gives bfloat16
        x = x.index_copy(0, first, starts.to(x.dtype))
        x = x + repeated(lengths, lambda n: self.pos_emb[:n])
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

    def stack(self) -> flexkernels.StackWeights | None:
        """The blocks' weights as :func:`flexkernels.transformer_step_` takes them, not copied; fp8 it does not take."""
        if self.head.weight.dtype == FP8:
            return None
        return flexkernels.StackWeights([block.weights() for block in self.blocks])

    def step(self, state: decoding.State, samples: int, limit: int) -> None:
        """Draws the next token of the first ``samples`` samples, in place; ``limit`` bounds the cache that is read.

        Nothing here looks at a value on the host, so that a CUDA graph can hold it.
        """
        view = state.view(samples, limit)
        self.draw(self.hidden(view, state.stack), view, state.sampler)

    def hidden(self, view: decoding.View, stack: flexkernels.StackWeights | None) -> torch.Tensor:
        """Normed outputs ``[rows, width]`` of one step on each row of the view, whose length grows by the new token."""
        x = F.embedding(view.ids, self.tok_emb.weight) + F.embedding(view.position, self.pos_emb)
        view.length.add_(1)
        if not self._in_one_call(x, view, stack):
            x = self.blocks_step(x, view)
        elif len(x) <= SKINNY_ROWS:
            self._stack_step(x, stack, view.k, view.v, view.length, view.cross)
        else:
            for part in parts(len(x)):
                cross = view.cross
                # rows that share contexts cycle through them, and parts are of even length
                if self.ctx_in is not None and len(cross[0][2]) == len(x):
                    cross = [tuple(t[part] for t in c) for c in cross]
                self._stack_step(x[part], stack, view.k[:, part], view.v[:, part], view.length[part], cross)
        return self.norm(x)

    def _in_one_call(self, x: torch.Tensor, view: decoding.View, stack: flexkernels.StackWeights | None) -> bool:
        """Whether all blocks take x at once: on a CPU in native code, on a GPU as one kernel."""
        if stack is None or x.device.type == "cpu":
            return stack is not None and len(x) <= PARTS["cpu"]
        if len(x) > SKINNY_ROWS or not flexkernels.prefers_persistent_step(stack):
            return False
        context = self._context(view.cross)
        return transformer_step_refusal(x, stack, view.k, view.v, view.length, **context) is None

    def _context(self, cross: list) -> dict:
        """Keys, values and lengths of the captions as ``transformer_step_`` takes them."""
        return {} if self.ctx_in is None else {"cross": [c[:2] for c in cross], "cross_len": cross[0][2]}

    def _stack_step(self, x: torch.Tensor, stack, k, v, length, cross: list) -> None:
        """x: at most ``SKINNY_ROWS`` rows, in place through all blocks in one call."""
        transformer_step_(x, stack, k, v, length, **self._context(cross))

    def blocks_step(self, x: torch.Tensor, view: decoding.View) -> torch.Tensor:
        """x ``[rows * n, width]``, n tokens a row, through all blocks, op by op: for a CUDA graph, for several tokens,
        and above the rows of one call."""
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
        self, class_id: int | str | Sequence[int | str] | torch.Tensor | None = None,
        text_emb: torch.Tensor | Sequence[torch.Tensor] | None = None, text_mask: torch.Tensor | None = None, *,
        n: int | None = None, frames: int = 5, tokens_per_frame: int | Sequence[int] | None = None,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        guidance: float | None = None, seed: int = 0, prompt: torch.Tensor | Sequence[torch.Tensor] | None = None,
        cuda_graph: bool | None = None, draft: Generator | None = None, draft_tokens: int = 4,
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
            cuda_graph: replay the step as a CUDA graph, one for each cache length bucket; None: on a GPU. The graphs of
                the last two shapes, and their caches, are kept with the model for calls to come.
            draft: a cheaper Generator of the same ids and conditions, which proposes ``draft_tokens`` (1 to 15) tokens
                that this one verifies in one step; the ids are those without it, see :mod:`vft.speculation`,
                but for roundings where one kernel takes all blocks (FLEXKERNELS_PERSISTENT_STEP=0: without exception).

        Raises:
            TypeError, ValueError: an argument of the wrong kind or range; a draft that does not fit; more tokens than
                ``seq_len``. ValueError where logits are NaN, by the last yield at the latest: on a GPU nothing is read
                before.
        """
        sampling = decoding.Sampling(temperature, top_k, top_p, min_p, guidance, seed)
        request = self.request(class_id, text_emb, text_mask, n, frames, tokens_per_frame, prompt, sampling)
        graphs = self._graphs_wanted(cuda_graph)
        if draft is None:
            return decoding.levels(self, request, sampling, cuda_graph)
        speculation.check_draft(self, draft, draft_tokens, request)
        return speculation.levels(self, draft, draft_tokens, request, sampling, graphs)

    @called_as(stream)
    def generate(self, *condition, **options) -> torch.Tensor:
        """Generates ids, int64 ``[n, frames, tokens_per_frame]`` on the model's device; arguments: :meth:`stream`'s."""
        *_, ids = self.stream(*condition, **options)
        return ids.contiguous()

    def session(
        self,
        max_rows: int = 8,
        *,
        max_len: int | None = None,
        text_len: int | None = None,
        cuda_graph: bool | None = None,
    ) -> Session:
        """A running batch that requests join and leave: continuous batching.

            session = gen.session(max_rows=8)
            session.add("zoom", seed=1, guidance=4.0)
            while session.waiting or session.running:
                session.step()
                for handle, ids in session.finished(): ...

        Each request has its own condition, length, prompt, sampling settings, guidance and seed. Its ids are those of
        ``generate`` with the same arguments and n = 1, bit for bit, whatever runs beside it: up to 32 active rows on
        the CPU and 16 on a GPU (8 where one kernel takes all blocks), of which layers give a row the same bits alone
        or among others. Beyond, sums are rounded in another order, and an id may differ where two are nearly as likely.

        Args:
            max_rows: rows of the batch; a request takes one, with guidance two.
            max_len: most tokens (frames * tokens_per_frame) of a request; default ``seq_len``. Bounds the caches:
                ``memory(max_rows, 1, max_len, guidance=False)``.
            text_len: text models: the longest caption; default 256, or that of the null caption if it is longer.
            cuda_graph: replay the forward pass as a CUDA graph, one for each bucket of rows (powers of two) and of
                cache length; None: on a GPU.

        Raises TypeError or ValueError for an argument of the wrong kind or range.
        """
        decoding.check_integer("max_rows", max_rows, 1)
        max_len = self.config.seq_len if max_len is None else max_len
        decoding.check_integer("max_len", max_len, 1)
        if max_len > self.config.seq_len:
            raise ValueError(f"max_len must be at most seq_len = {self.config.seq_len}, got {max_len}")
        if self.ctx_in is None:
            if text_len is not None:
                raise ValueError("text_len must be None: this model is conditioned on classes")
            text_len = 0
        else:
            text_len = TEXT_LEN if text_len is None else text_len
            decoding.check_integer("text_len", text_len, 1)
            text_len = max(text_len, self.config.n_ctx_null)
        return Session(self, max_rows, max_len, text_len, self._graphs_wanted(cuda_graph))

    def _graphs_wanted(self, cuda_graph: bool | None) -> bool:
        """Whether to replay CUDA graphs; None: on a GPU."""
        if cuda_graph and self.device.type != "cuda":
            raise ValueError(f"cuda_graph must be off on {self.device}")
        return self.device.type == "cuda" if cuda_graph is None else cuda_graph

    def generate_tokens(
        self, tokenizer: Tokenizer, *condition: Any, fps: float = 8.0, size: int | None = None, **options: Any
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

    def request(
        self, class_id, text_emb, text_mask, n, frames, tokens_per_frame, prompt, sampling: decoding.Sampling
    ) -> decoding.Request:
        """The checked arguments of :meth:`stream` and of a session's ``add``; warns where they leave the training."""
        request = decoding.Request.checked(
            self.config, self.conditions(class_id, text_emb, text_mask, n), frames=frames,
            tokens_per_frame=tokens_per_frame, prompt=prompt, guided=sampling.guided,
        )  # fmt: skip
        if frames > self.config.trained_frames:
            warnings.warn(
                f"frames {frames} are more than the {self.config.trained_frames} that the generator was trained on: "
                f"{request.levels} tokens a frame",
                TokensWarning,
                stacklevel=3,
            )
        return request

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
