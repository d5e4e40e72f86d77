"""The layers of the tokenizer, over packed sequences: everything is ``[tokens, width]``, no padding, no batch axis."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import flexkernels

from .config import PosEmb, TokenizerConfig, Trunk
from .fp8 import Fp8Linear
from .packing import Member, Packing, packing

EPS = 1e-5
# prepared hidden widths are multiples of this
MLP_ALIGNMENT = 64
# initial scale of positions and registers: near that of embedded patches, so that short training tells places apart
POSITION_STD = 0.4


def patchify(latents: Sequence[torch.Tensor], patch: tuple[int, int, int]) -> torch.Tensor:
    """List of ``[C, T, H, W]`` -> ``[sum T/pt * H/ph * W/pw, pt*ph*pw*C]``, raster order, channel fastest."""
    pt, ph, pw = patch
    rows = []
    # neighbours of one shape at once
    for (c, t, h, w), first, end in runs([x.shape for x in latents]):
        x = torch.stack(tuple(latents[first:end])).view(-1, c, t // pt, pt, h // ph, ph, w // pw, pw)
        rows.append(x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(-1, pt * ph * pw * c))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def unpatchify(
    x: torch.Tensor, grids: Sequence[tuple[int, int, int]], patch: tuple[int, int, int]
) -> list[torch.Tensor]:
    """The inverse of :func:`patchify`: patch vectors of all samples, (frames, rows, columns) of each -> list of
    ``[C, T, H, W]``."""
    pt, ph, pw = patch
    alike, found = [(grid, end - first) for grid, first, end in runs(grids)], []
    for ((t, h, w), n), rows in zip(alike, x.split([n * math.prod(grid) for grid, n in alike]), strict=True):
        rows = rows.view(n, t, h, w, pt, ph, pw, -1)
        found += rows.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(n, -1, t * pt, h * ph, w * pw).unbind()
    return found


class PositionTable(nn.Module):
    """A positional embedding table, cropped from index 0; stored tensors only (sincos tables are read, not made)."""

    def __init__(self, config: PosEmb, width: int) -> None:
        super().__init__()
        self.config = config
        sizes = config.sizes
        shape = (1, width, *sizes) if config.kind == "sincos" else (len(sizes), 1, width, sizes[0])
        self.table = nn.Parameter(torch.empty(shape), requires_grad=config.kind != "sincos")
        nn.init.normal_(self.table, std=POSITION_STD)

    def forward(self, shape: tuple[int, ...]) -> torch.Tensor:
        """``[prod(shape), width]``: row (t, h, w) is pe_t[t] + pe_h[h] + pe_w[w], or their product.

        A table of fewer axes covers the last ones, and is the same along the others.
        """
        others, shape = shape[: -len(self.config.sizes)], shape[-len(self.config.sizes) :]
        for n, size in zip(shape, self.config.sizes, strict=True):
            if n > size:
                raise ValueError(f"the positional table covers {list(self.config.sizes)}, got a grid of {list(shape)}")
        return self._rows(shape).repeat(math.prod(others), 1)

    def _rows(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self.config.kind == "sincos":
            crop = self.table[(0, slice(None), *(slice(n) for n in shape))]
            return crop.flatten(1).T
        axes = []
        for axis, n in enumerate(shape):
            rows = self.table[axis, 0, :, :n].T
            axes.append(rows.view(*[n if a == axis else 1 for a in range(len(shape))], -1))
        out = reduce(operator.mul if self.config.kind == "learnable_prod" else operator.add, axes)
        return out.reshape(-1, self.table.shape[2])


class Merged(nn.Module):
    """A module whose linear layers' weights can lie side by side in one tensor, so that one product serves them all.

    :meth:`prepare` moves weights that need no gradient into that tensor, once; the layers' own weights become views of
    it, so nothing is held twice and names stay. Without it the weights are joined at each call, with their gradients.
    """

    _joined: dict[str, torch.Tensor] | None = None
    # set where the weights were rounded: then there is nothing to join
    quantized = False

    def _join(self) -> dict[str, torch.Tensor | None]:
        raise NotImplementedError

    def _adopt(self, joined: dict[str, torch.Tensor | None]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def prepare(self) -> None:
        if self.quantized:
            return
        first = next(self.parameters())
        # weights that somebody else moved or cast have left the tensor
        if self._joined is not None and first.data_ptr() == self._joined["weight"].data_ptr():
            return
        self._joined = None
        if not first.requires_grad:
            joined = self._join()
            self._adopt(joined)
            self._joined = joined

    def separate(self) -> None:
        """Undoes :meth:`prepare`: every weight has a memory of its own again."""
        if self._joined is not None:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            self._joined = None

    def joined(self) -> dict[str, torch.Tensor | None]:
        if self._joined is None or next(self.parameters()).requires_grad:
            return self._join()
        return self._joined

    def _apply(self, fn, recurse=True):
        # moving or casting gives every weight a place of its own
        self._joined = None
        return super()._apply(fn, recurse)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._joined = None


def _cat(tensors) -> torch.Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)


def _take_views(whole: torch.Tensor | None, linears, name: str, starts) -> None:
    if whole is not None:
        for linear, start in zip(linears, starts, strict=True):
            parameter = getattr(linear, name)
            parameter.data = whole[start : start + len(parameter)]


class Attention(Merged):
    """Self-attention with LayerNorm on q and k and softmax scale 8 / head_dim."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.heads, self.head_dim = trunk.heads, trunk.head_dim
        self.wq = nn.Linear(trunk.width, trunk.width, bias=trunk.qkv_bias)
        self.wk = nn.Linear(trunk.width, trunk.width, bias=trunk.qkv_bias)
        self.wv = nn.Linear(trunk.width, trunk.width, bias=trunk.qkv_bias)
        self.proj = nn.Linear(trunk.width, trunk.width, bias=trunk.proj_bias)

    def _join(self):
        linears = (self.wq, self.wk, self.wv)
        return {"weight": _cat([x.weight for x in linears]), "bias": _cat([x.bias for x in linears])}

    def _adopt(self, joined):
        width = self.wq.out_features
        for name, whole in joined.items():
            _take_views(whole, (self.wq, self.wk, self.wv), name, (0, width, 2 * width))

    def quantize(self) -> None:
        """Rounds the matrices to fp8, in place."""
        self.qkv, self.proj = Fp8Linear(**self._join()), Fp8Linear(self.proj.weight, self.proj.bias)
        del self.wq, self.wk, self.wv
        self.quantized, self._joined = True, None

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        qkv = self.qkv(x) if self.quantized else F.linear(x, **self.joined())
        q, k, v = flexkernels.qk_norm(qkv, self.heads, norm="layer", eps=EPS)
        out = flexkernels.attention(
            q, k, v, packing.layout, softmax_scale=8 / self.head_dim, key_log_weight=packing.key_log_weight
        )
        return self.proj(out.flatten(-2))


class GatedMLP(Merged):
    """fc2(silu(fc1 x) * fc3 x); prepared, the hidden width is padded with zeros to a multiple of MLP_ALIGNMENT."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.fc1 = nn.Linear(trunk.width, trunk.mlp_width, bias=trunk.mlp_bias)
        self.fc2 = nn.Linear(trunk.mlp_width, trunk.width, bias=trunk.mlp_bias)
        self.fc3 = nn.Linear(trunk.width, trunk.mlp_width, bias=trunk.mlp_bias)

    def _join(self):
        first, last, out = self.fc1, self.fc3, self.fc2.weight
        extra = -first.out_features % MLP_ALIGNMENT
        if extra == 0:
            return {
                "weight": torch.cat([first.weight, last.weight]),
                "bias": _cat([first.bias, last.bias]),
                "weight_out": out,
            }
        # silu(0) * 0 = 0: hidden units of zero weight add nothing
        zero = out.new_zeros(extra, out.shape[0])
        none = None if first.bias is None else first.bias.new_zeros(extra)
        return {
            "weight": torch.cat([first.weight, zero, last.weight, zero]),
            "bias": _cat([first.bias, none, last.bias, none]),
            "weight_out": torch.cat([out, zero.T], 1),
        }

    def _adopt(self, joined):
        half = len(joined["weight"]) // 2
        for name in ("weight", "bias"):
            _take_views(joined[name], (self.fc1, self.fc3), name, (0, half))
        self.fc2.weight.data = joined["weight_out"][:, : self.fc2.in_features]

    def quantize(self) -> None:
        """Rounds the matrices to fp8, in place."""
        joined = self._join()
        self.fc13 = Fp8Linear(joined["weight"], joined["bias"])
        self.fc2 = Fp8Linear(joined["weight_out"], self.fc2.bias)
        del self.fc1, self.fc3
        self.quantized, self._joined = True, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantized:
            return self.fc2(flexkernels.swiglu(self.fc13(x)))
        joined = self.joined()
        hidden = flexkernels.swiglu(F.linear(x, joined["weight"], joined["bias"]))
        return F.linear(hidden, joined["weight_out"], self.fc2.bias)


class Block(nn.Module):
    """x += attn(LN(x)); x += mlp(LN(x)); with ``conditioned``, shifts, scales and gates from the time step (adaLN)."""

    def __init__(self, trunk: Trunk, conditioned: bool) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(trunk), GatedMLP(trunk)
        self.adaLN_modulation = _modulation(trunk.width, 2 * 6 * trunk.width) if conditioned else None


class Modulation(NamedTuple):
    """What adaLN adds; the rows of patches and of registers take turns.

    blocks: ``[depth, 2 * times, 6 * width]``, gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp.
    head: ``[2 * times, 2 * width]``, shift and scale.
    """

    blocks: torch.Tensor
    head: torch.Tensor


def run_blocks(
    blocks, x: torch.Tensor, packing: Packing, modulation: Modulation | None = None, recompute: bool = False
) -> torch.Tensor:
    """The normalised (and modulated) input of the head, ``[total, width]``.

    Gate, residual and the next branch's norm are one kernel, so each norm is computed where the branch before it ends.
    With ``recompute`` a block keeps its inputs alone for the backward pass.
    """
    if modulation is None:
        gates, norms, segment = [None] * (2 * len(blocks)), [(None, None)] * (2 * len(blocks) + 1), None
    else:
        gates, norms = [], []
        for table in modulation.blocks:
            gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = table.chunk(6, -1)
            gates += [gate_attn, gate_mlp]
            norms += [(shift_attn, scale_attn), (shift_mlp, scale_mlp)]
        norms.append(modulation.head.chunk(2, -1))
        segment = packing.segment(len(modulation.head) // 2)

    def run(i, x, h):
        for j, branch in ((2 * i, lambda h: blocks[i].attn(h, packing)), (2 * i + 1, blocks[i].mlp)):
            x, h = flexkernels.gated_residual_adaln_norm(x, branch(h), gates[j], *norms[j + 1], segment, eps=EPS)
        return x, h

    h = flexkernels.adaln_norm(x, *norms[0], segment, eps=EPS)
    for i in range(len(blocks)):
        x, h = checkpoint(run, i, x, h, use_reentrant=False) if recompute else run(i, x, h)
    return h


def _modulation(width: int, outputs: int) -> nn.Sequential:
    modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, outputs))
    nn.init.zeros_(modulation[1].weight)
    nn.init.zeros_(modulation[1].bias)
    return modulation


def _init_linears(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and "adaLN_modulation" not in name:
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class Encoder(nn.Module):
    """Latents to register values: patches and learned registers through a causal transformer, LN, linear.

    ``recompute``: see :func:`run_blocks`, for training.
    """

    recompute = False

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        trunk = config.encoder
        self.config = config
        self.patch_embed = nn.Linear(math.prod(config.patch) * config.channels, trunk.width)
        self.patch_posemb = PositionTable(trunk.patch_posemb, trunk.width) if trunk.patch_posemb else None
        self.registers = nn.Parameter(torch.empty(config.max_frames, config.register_table, trunk.width))
        self.blocks = nn.ModuleList(Block(trunk, conditioned=False) for _ in range(trunk.depth))
        self.head = nn.Linear(trunk.width, len(config.levels), bias=config.encoder_head.bias)
        _init_linears(self)
        nn.init.normal_(self.registers, std=POSITION_STD)
        # register values start well inside the range that FSQ resolves
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, latents: list[torch.Tensor]) -> torch.Tensor:
        """List of ``[C, T, H, W]`` -> ``[sum T*N, len(levels)]``, the values before quantisation."""
        config = self.config
        grids = grids_of(latents, config)
        members = tuple(Member(i, config.registers) for i in range(len(grids)))
        packed = packing(grids, members, config.registers, (), config.encoder, False, latents[0].device)
        patches = embed_patches(latents, self.patch_embed, self.patch_posemb, grids, config)
        table = self.registers[:, : config.registers]
        registers = repeated([t for t, _, _ in grids], lambda t: table[:t].flatten(0, 1)).to(patches.dtype)
        x = torch.cat([patches, registers]).index_select(0, packed.order)
        h = run_blocks(self.blocks, x, packed, recompute=self.recompute)
        return self.head(h.index_select(0, packed.register_at))


class TimeEmbedding(nn.Sequential):
    """[cos, sin](t * freqs), freqs = (1000/max_timestep) * 256^(-i/half); then Linear, SiLU, Linear."""

    def __init__(self, width: int, frequencies: int, max_timestep: float) -> None:
        super().__init__(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half, self.odd, self.max_timestep = frequencies // 2, frequencies % 2, max_timestep

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        index = torch.arange(self.half, dtype=torch.float32, device=t.device)
        freqs = 1000.0 / self.max_timestep * torch.exp(-math.log(256) * index / self.half)
        angles = t[:, None].float() * freqs
        features = F.pad(torch.cat([angles.cos(), angles.sin()], -1), (0, self.odd))
        return super().forward(features.to(self[0].weight.dtype))


class Decoder(nn.Module):
    """Velocity of the flow: noised patches and register codes through an adaLN transformer.

    ``recompute``: see :func:`run_blocks`, for training.
    """

    recompute = False

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        trunk, width = config.decoder, config.decoder.width
        patch_dim = math.prod(config.patch) * config.channels
        self.config = config
        self.code_embed = nn.Linear(len(config.levels), width, bias=config.code_bias)
        self.register_posemb = PositionTable(config.register_posemb, width) if config.register_posemb else None
        for name, op in (("mask_token", "keep"), ("prefix_token", "prefix"), ("null_token", "null")):
            token = nn.Parameter(0.02 * torch.randn(width)) if op in config.register_ops else None
            self.register_parameter(name, token)
        self.patch_embed = nn.Linear(patch_dim, width)
        self.patch_posemb = PositionTable(trunk.patch_posemb, width) if trunk.patch_posemb else None
        self.time_embed = TimeEmbedding(width, config.time_frequencies, config.max_timestep)
        self.blocks = nn.ModuleList(Block(trunk, conditioned=True) for _ in range(trunk.depth))
        head = config.decoder_head
        self.head_modulation = nn.Linear(width, 2 * width, bias=head.modulation_bias) if head.modulated else None
        self.head = nn.Linear(width, patch_dim, bias=head.bias)
        _init_linears(self)
        # codes as loud as their positions
        nn.init.normal_(self.code_embed.weight, std=len(config.levels) ** -0.5)
        for layer in filter(None, (self.head_modulation, self.head)):
            nn.init.zeros_(layer.weight)

    def forward(
        self, latents, t, codes, keep, prefix_frames, null, collapse: bool = True, registers: int | None = None
    ) -> list[torch.Tensor]:
        """The velocity at time t.

        latents: list of noised ``[C, T, H, W]``; t ``[samples or 1]`` in [0, 1]; codes ``[sum T*N, D]``; keep and
        prefix_frames: ints, one a sample; null: bools, one a sample (true: unconditional); registers: N, where a frame
        has fewer than the config's.
        """
        members = tuple(map(Member, range(len(latents)), keep, prefix_frames, null))
        packed = self.packing(latents, members, collapse, registers)
        return self.velocity(latents, self.embed_registers(codes, packed), self.modulation(t), packed)

    def packing(self, latents, members: tuple[Member, ...], collapse: bool, registers: int | None = None) -> Packing:
        config = self.config
        grids = grids_of(latents, config)
        arguments = (registers or config.registers, config.register_ops, config.decoder, collapse, latents[0].device)
        return packing(grids, members, *arguments)

    def velocity(self, latents, registers: torch.Tensor, modulation: Modulation, packed: Packing) -> list[torch.Tensor]:
        """List of ``[C, T, H, W]``, one a sequence of the packing; registers as :meth:`embed_registers` gives them."""
        config = self.config
        patches = embed_patches(latents, self.patch_embed, self.patch_posemb, grids_of(latents, config), config)
        x = torch.cat([patches, registers]).index_select(0, packed.order)
        h = run_blocks(self.blocks, x, packed, modulation, self.recompute)
        return unpatchify(self.head(h.index_select(0, packed.patch_at)), packed.grids, config.patch)

    def modulation(self, t: torch.Tensor) -> Modulation:
        """What adaLN adds at the times t ``[times]``, all blocks at once."""
        temb = F.silu(self.time_embed(t))
        blocks = [block.adaLN_modulation[1](temb).view(2 * len(t), -1) for block in self.blocks]
        head = temb.new_zeros(len(t), 2 * temb.shape[1])
        if self.head_modulation is not None:
            head = self.head_modulation(temb)
        return Modulation(torch.stack(blocks), head.repeat_interleave(2, 0))

    def embed_registers(self, codes: torch.Tensor, packed: Packing) -> torch.Tensor:
        """codes ``[sum T*N, D]`` of all samples -> ``[R, width]``, the registers of a packing in its order."""
        x = self.code_embed(codes)
        absent = x.new_zeros(x.shape[1])
        tokens = [t if t is not None else absent for t in (self.mask_token, self.prefix_token, self.null_token)]
        x = torch.cat([x, torch.stack(tokens).to(x.dtype)]).index_select(0, packed.register_base)
        if self.register_posemb is None:
            return x
        positions = self.register_posemb((packed.frames, packed.registers)).to(x.dtype)
        return x + torch.cat([positions, absent[None]]).index_select(0, packed.register_position)


def grids_of(latents: list[torch.Tensor], config: TokenizerConfig) -> tuple[tuple[int, int, int], ...]:
    """(frames, rows, columns) in patches of each sample."""
    return tuple(tuple(n // p for n, p in zip(x.shape[1:], config.patch, strict=True)) for x in latents)


def embed_patches(latents, linear, posemb, grids, config: TokenizerConfig) -> torch.Tensor:
    """List of ``[C, T, H, W]`` -> ``[sum T*P, width]`` with positions added."""
    x = linear(patchify(latents, config.patch).to(linear.weight.dtype))
    if posemb is None:
        return x
    return x + repeated(grids, posemb).to(x.dtype)


def repeated(kinds: Sequence[Hashable], rows: Callable[[Hashable], torch.Tensor]) -> torch.Tensor:
    """The rows of all of ``kinds`` one after the other; ``rows(kind)`` ``[n, width]`` is made once for a run of it."""
    return torch.cat([rows(kind).repeat(end - first, 1) for kind, first, end in runs(kinds)])


def runs(kinds: Sequence[Hashable]) -> list[tuple[Hashable, int, int]]:
    """(kind, first, end) of each run of neighbours that are equal."""
    ends = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]] + [len(kinds)]
    return [(kinds[first], first, end) for first, end in zip([0, *ends[:-1]], ends, strict=True)]
