"""The layers of the tokenizer, over packed sequences: everything is ``[tokens, width]``, no padding, no batch axis.

A packed batch holds, sample by sample and frame by frame, the frame's patches and then its registers.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import nn

import flexkernels

from .config import PosEmb, TokenizerConfig, Trunk

EPS = 1e-5
# initial scale of positions and registers: near that of embedded patches, so that short training tells places apart
POSITION_STD = 0.4


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis without parameters, in float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.layer_norm(x.to(dtype), x.shape[-1:], eps=EPS).to(x.dtype)


class Packing:
    """Where the tokens of a ragged batch lie. ``grids`` are (frames, rows, columns) in patches, one per sample."""

    def __init__(self, grids: tuple[tuple[int, int, int], ...], registers: int, trunk: Trunk, device) -> None:
        self.grids, self.registers = grids, registers
        self.patches = [t * h * w for t, h, w in grids]
        frames = [[(h * w, registers)] * t for t, h, w in grids]
        self.layout = flexkernels.SequenceLayout(frames, trunk.mask, dict(trunk.cross_frame or ()), device)
        # neighbouring samples with equally large frames form one run: (frames, patches a frame)
        self.runs: list[tuple[int, int]] = []
        for t, h, w in grids:
            if self.runs and self.runs[-1][1] == h * w:
                self.runs[-1] = (self.runs[-1][0] + t, h * w)
            else:
                self.runs.append((t, h * w))

    def join(self, patches: torch.Tensor, registers: torch.Tensor) -> torch.Tensor:
        """patches ``[sum T*P, width]`` and registers ``[sum T*N, width]`` -> packed ``[total, width]``."""
        width, n, pieces, p0, r0 = patches.shape[-1], self.registers, [], 0, 0
        for t, p in self.runs:
            frame_patches = patches[p0 : p0 + t * p].view(t, p, width)
            frame_registers = registers[r0 : r0 + t * n].view(t, n, width)
            pieces.append(torch.cat([frame_patches, frame_registers], 1).view(-1, width))
            p0, r0 = p0 + t * p, r0 + t * n
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def part(self, x: torch.Tensor, registers: bool) -> torch.Tensor:
        """The registers ``[sum T*N, width]`` or the patches ``[sum T*P, width]`` of a packed sequence."""
        pieces, start = [], 0
        for t, p in self.runs:
            frames = x[start : start + t * (p + self.registers)].view(t, p + self.registers, -1)
            pieces.append((frames[:, p:] if registers else frames[:, :p]).reshape(-1, x.shape[-1]))
            start += t * (p + self.registers)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def expand(self, table: torch.Tensor) -> torch.Tensor:
        """Modulation rows ``[samples or 1, 2, width]`` (for patches, for registers) -> one row a token."""
        if len(table) == 1:
            runs = [(1, t, p) for t, p in self.runs]
        elif len(self.runs) == 1 and len({t for t, _, _ in self.grids}) == 1:
            runs = [(len(self.grids), self.grids[0][0], self.runs[0][1])]
        else:
            runs = [(1, t, h * w) for t, h, w in self.grids]
        pieces, row = [], 0
        for samples, t, p in runs:
            rows = table[row : row + samples]
            patch, register = rows[:, None, :1], rows[:, None, 1:]
            frames = torch.cat([patch.expand(samples, t, p, -1), register.expand(samples, t, self.registers, -1)], 2)
            pieces.append(frames.reshape(-1, table.shape[-1]))
            row += samples if len(table) > 1 else 0
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def patchify(x: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """``[C, T, H, W]`` -> ``[T/pt * H/ph * W/pw, pt*ph*pw*C]``, raster order, channel fastest."""
    c, t, h, w = x.shape
    pt, ph, pw = patch
    x = x.view(c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(1, 3, 5, 2, 4, 6, 0).reshape(-1, pt * ph * pw * c)


def unpatchify(x: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> torch.Tensor:
    """The inverse of :func:`patchify`: patch vectors -> ``[C, T, H, W]``."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.view(t, h, w, pt, ph, pw, -1)
    return x.permute(6, 0, 3, 1, 4, 2, 5).reshape(-1, t * pt, h * ph, w * pw)


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
        """``[prod(shape), width]``: row (t, h, w) is pe_t[t] + pe_h[h] + pe_w[w], or their product."""
        for n, size in zip(shape, self.config.sizes, strict=True):
            if n > size:
                raise ValueError(f"the positional table covers {list(self.config.sizes)}, got a grid of {list(shape)}")
        if self.config.kind == "sincos":
            crop = self.table[(0, slice(None), *(slice(n) for n in shape))]
            return crop.flatten(1).T
        axes = []
        for axis, n in enumerate(shape):
            rows = self.table[axis, 0, :, :n].T
            axes.append(rows.view(*[n if a == axis else 1 for a in range(len(shape))], -1))
        out = reduce(operator.mul if self.config.kind == "learnable_prod" else operator.add, axes)
        return out.reshape(-1, self.table.shape[2])


class Attention(nn.Module):
    """Self-attention with LayerNorm on q and k and softmax scale 8 / head_dim."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.heads, self.head_dim = trunk.heads, trunk.head_dim
        self.wq = nn.Linear(trunk.width, trunk.width, bias=trunk.qkv_bias)
        self.wk = nn.Linear(trunk.width, trunk.width, bias=trunk.qkv_bias)
        self.wv = nn.Linear(trunk.width, trunk.width, bias=trunk.qkv_bias)
        self.proj = nn.Linear(trunk.width, trunk.width, bias=trunk.proj_bias)

    def forward(self, x: torch.Tensor, layout: flexkernels.SequenceLayout) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (self.heads, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = layer_norm(q), layer_norm(k)
        out = flexkernels.attention(q, k, v, layout, softmax_scale=8 / self.head_dim)
        return self.proj(out.flatten(-2))


class GatedMLP(nn.Module):
    """fc2(silu(fc1 x) * fc3 x)."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.fc1 = nn.Linear(trunk.width, trunk.mlp_width, bias=trunk.mlp_bias)
        self.fc2 = nn.Linear(trunk.mlp_width, trunk.width, bias=trunk.mlp_bias)
        self.fc3 = nn.Linear(trunk.width, trunk.mlp_width, bias=trunk.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """x += attn(LN(x)); x += mlp(LN(x)); with ``conditioned``, shifts, scales and gates from the time step (adaLN)."""

    def __init__(self, trunk: Trunk, conditioned: bool) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(trunk), GatedMLP(trunk)
        self.adaLN_modulation = _modulation(trunk.width, 2 * 6 * trunk.width) if conditioned else None

    def forward(self, x: torch.Tensor, packing: Packing, temb: torch.Tensor | None = None) -> torch.Tensor:
        if self.adaLN_modulation is None:
            x = x + self.attn(layer_norm(x), packing.layout)
            return x + self.mlp(layer_norm(x))
        table = self.adaLN_modulation(temb).unflatten(-1, (2, -1))
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = packing.expand(table).chunk(6, -1)
        x = x + gate_attn * self.attn(layer_norm(x) * (1 + scale_attn) + shift_attn, packing.layout)
        return x + gate_mlp * self.mlp(layer_norm(x) * (1 + scale_mlp) + shift_mlp)


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
    """Latents to register values: patches and learned registers through a causal transformer, LN, linear."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        trunk = config.encoder
        self.config = config
        self.patch_embed = nn.Linear(math.prod(config.patch) * config.channels, trunk.width)
        self.patch_posemb = PositionTable(trunk.patch_posemb, trunk.width) if trunk.patch_posemb else None
        self.registers = nn.Parameter(torch.empty(config.max_frames, config.registers, trunk.width))
        self.blocks = nn.ModuleList(Block(trunk, conditioned=False) for _ in range(trunk.depth))
        self.head = nn.Linear(trunk.width, len(config.levels))
        _init_linears(self)
        nn.init.normal_(self.registers, std=POSITION_STD)
        # register values start well inside the range that FSQ resolves
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, latents: list[torch.Tensor]) -> torch.Tensor:
        """List of ``[C, T, H, W]`` -> ``[sum T*N, len(levels)]``, the values before quantisation."""
        config = self.config
        packing = packing_of(latents, config, config.encoder)
        x = embed_patches(latents, self.patch_embed, self.patch_posemb, packing, config)
        registers = torch.cat([self.registers[:t].flatten(0, 1) for t, _, _ in packing.grids]).to(x.dtype)
        x = packing.join(x, registers)
        for block in self.blocks:
            x = block(x, packing)
        return self.head(layer_norm(packing.part(x, registers=True)))


class TimeEmbedding(nn.Sequential):
    """[cos, sin](t * freqs), freqs = (1000/max_timestep) * 256^(-i/half); then Linear, SiLU, Linear."""

    def __init__(self, width: int, frequencies: int, max_timestep: float) -> None:
        super().__init__(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half, self.max_timestep = frequencies // 2, max_timestep

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        index = torch.arange(self.half, dtype=torch.float32, device=t.device)
        freqs = 1000.0 / self.max_timestep * torch.exp(-math.log(256) * index / self.half)
        angles = t[:, None].float() * freqs
        return super().forward(torch.cat([angles.cos(), angles.sin()], -1).to(self[0].weight.dtype))


class Decoder(nn.Module):
    """Velocity of the flow: noised patches and register codes through an adaLN transformer."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        trunk, width = config.decoder, config.decoder.width
        patch_dim = math.prod(config.patch) * config.channels
        self.config = config
        self.code_embed = nn.Linear(len(config.levels), width)
        self.register_posemb = PositionTable(config.register_posemb, width) if config.register_posemb else None
        for name, op in (("mask_token", "keep"), ("prefix_token", "prefix"), ("null_token", "null")):
            token = nn.Parameter(0.02 * torch.randn(width)) if op in config.register_ops else None
            self.register_parameter(name, token)
        self.patch_embed = nn.Linear(patch_dim, width)
        self.patch_posemb = PositionTable(trunk.patch_posemb, width) if trunk.patch_posemb else None
        self.time_embed = TimeEmbedding(width, config.time_frequencies, config.max_timestep)
        self.blocks = nn.ModuleList(Block(trunk, conditioned=True) for _ in range(trunk.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch_dim)
        _init_linears(self)
        # codes as loud as their positions
        nn.init.normal_(self.code_embed.weight, std=len(config.levels) ** -0.5)
        for layer in (self.head_modulation, self.head):
            nn.init.zeros_(layer.weight)

    def forward(self, latents, t, codes, keep, prefix_frames, null) -> list[torch.Tensor]:
        """The velocity at time t.

        latents: list of noised ``[C, T, H, W]``; t ``[samples or 1]`` in [0, 1]; codes ``[sum T*N, D]``; keep and
        prefix_frames: ints, one a sample; null: bools, one a sample (true: unconditional).
        """
        config = self.config
        packing = packing_of(latents, config, config.decoder)
        patches = embed_patches(latents, self.patch_embed, self.patch_posemb, packing, config)
        x = packing.join(patches, self.embed_registers(codes, packing, keep, prefix_frames, null))
        temb = self.time_embed(t)
        for block in self.blocks:
            x = block(x, packing, temb)
        x = packing.part(x, registers=False)
        shift, scale = self._head_rows(temb, packing)
        x = self.head(layer_norm(x) * (1 + scale) + shift)
        pieces = x.split(packing.patches)
        return [unpatchify(p, g, config.patch) for p, g in zip(pieces, packing.grids, strict=True)]

    def _head_rows(self, temb: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.head_modulation(F.silu(temb))
        if len(rows) > 1:
            counts = torch.tensor(packing.patches, device=rows.device)
            rows = rows.repeat_interleave(counts, 0, output_size=sum(packing.patches))
        shift, scale = rows.chunk(2, -1)
        return shift, scale

    def embed_registers(self, codes, packing: Packing, keep, prefix_frames, null) -> torch.Tensor:
        """codes ``[sum T*N, D]`` -> ``[sum T*N, width]`` with the config's order of embedding and masking."""
        n = packing.registers
        x = self.code_embed(codes)
        frames = [t for t, _, _ in packing.grids]
        rows = lambda values: torch.tensor(values, device=x.device).repeat_interleave(  # noqa: E731
            torch.tensor([t * n for t in frames], device=x.device), output_size=sum(frames) * n
        )
        for op in self.config.register_ops:
            if op == "posemb":
                x = x + torch.cat([self.register_posemb((t, n)) for t in frames]).to(x.dtype)
            elif op == "keep" and any(k < n for k in keep):
                index = torch.arange(n, device=x.device).repeat(sum(frames))
                x = torch.where((index < rows(keep))[:, None], x, self.mask_token.to(x.dtype))
            elif op == "prefix" and any(prefix_frames):
                index = torch.cat([torch.arange(t, device=x.device).repeat_interleave(n) for t in frames])
                x = torch.where((index >= rows(prefix_frames))[:, None], x, self.prefix_token.to(x.dtype))
            elif op == "null" and any(null):
                x = torch.where(rows(null)[:, None], self.null_token.to(x.dtype), x)
        return x


def packing_of(latents: list[torch.Tensor], config: TokenizerConfig, trunk: Trunk) -> Packing:
    """The packing of these latents, built once per set of shapes."""
    grids = tuple(tuple(n // p for n, p in zip(x.shape[1:], config.patch, strict=True)) for x in latents)
    return _packing(grids, config.registers, trunk, latents[0].device)


@lru_cache(maxsize=64)
def _packing(grids, registers: int, trunk: Trunk, device: torch.device) -> Packing:
    return Packing(grids, registers, trunk, device)


def embed_patches(latents, linear, posemb, packing: Packing, config: TokenizerConfig) -> torch.Tensor:
    """List of ``[C, T, H, W]`` -> ``[sum T*P, width]`` with positions added."""
    x = linear(torch.cat([patchify(z, config.patch) for z in latents]).to(linear.weight.dtype))
    if posemb is None:
        return x
    tables = {g: posemb(g) for g in set(packing.grids)}
    return x + torch.cat([tables[g] for g in packing.grids]).to(x.dtype)
