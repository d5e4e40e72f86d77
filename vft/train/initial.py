"""Where a new tokenizer starts, so that short training is enough.

From random weights, registers take thousands of steps to find out which patches they speak for, and patches which
registers speak of them. Here each register starts with a region of the frame: the whole, then quadrants, then single
patches, pairs and halves. Places are one-hot codes in the first channels, which hold nothing else at first, and some
heads of every layer start by comparing just these. Nothing is fixed: all of it is trained on.
"""

from __future__ import annotations

import math

import torch

from ..tokenizer import Tokenizer

# rows and columns of regions, one register each; a longer list of registers starts over
PYRAMID = ((1, 1), (2, 2), (1, 1), (4, 4), (2, 4), (1, 2))
# the first code channels say what a token is: CONSTANT is in all, the others in patches, in registers of one patch, and
# in registers of larger regions
CONSTANT, PATCH, FINE, COARSE = range(4)
KINDS = 4
# of codes, beside channels near 1
AMPLITUDE = 2.0
# standard deviation of register values, which spreads them over all levels
VALUE_STD = 0.9


class Codes:
    """Unit codes ``[count]`` of kinds, frames, rows and columns of patches."""

    def __init__(self, frames: int, rows: int, columns: int) -> None:
        self.frames, self.rows, self.columns = frames, rows, columns
        self.count = KINDS + frames + rows + columns

    def __call__(self, kinds=(), frame: int | None = None, rows=(), columns=()) -> torch.Tensor:
        code = torch.zeros(self.count)
        code[list(kinds)] = 1
        if frame is not None:
            code[KINDS + frame] = 1
        for first, chosen in ((self.frames, rows), (self.frames + self.rows, columns)):
            for i in chosen:
                code[KINDS + first + i] = len(chosen) ** -0.5
        return code


def regions(registers: int, rows: int, columns: int) -> list[tuple[range, range]]:
    """The rows and columns of patches that each register starts with."""
    found: list[tuple[range, range]] = []
    while len(found) < registers:
        for down, across in PYRAMID:
            if down > rows or across > columns:
                continue
            found += [(_part(rows, down, i), _part(columns, across, j)) for i, j in cells(down, across)]
    return found[:registers]


def cells(rows: int, columns: int) -> list[tuple[int, int]]:
    """All (row, column), those far apart after each other, so that the first few are spread over the frame."""
    found = [(i, j) for i in range(rows) for j in range(columns)]
    return sorted(found, key=lambda cell: (_reversed(cell[0] ^ cell[1]), _reversed(cell[0])))


def fits(model: Tokenizer, rows: int, columns: int) -> bool:
    """Whether :func:`start` can write its codes: sums of positions, and three heads a layer that hold a code."""
    config, decoder = model.config, model.decoder
    tables = (model.encoder.patch_posemb, decoder.patch_posemb, decoder.register_posemb)
    count = Codes(config.max_frames, rows, columns).count
    sums = all(table is not None and table.config.kind == "learnable_sum" for table in tables)
    wide = all(
        trunk.heads >= 3 and trunk.head_dim > count and trunk.width >= count + math.prod(config.patch) * config.channels
        for trunk in (config.encoder, config.decoder)
    )
    return sums and wide


@torch.no_grad()
def start(model: Tokenizer, rows: int, columns: int, latents: torch.Tensor) -> None:
    """Writes the starting point into a new tokenizer for frames of rows x columns patches, for which it :func:`fits`.

    ``latents [B, C, T, H, W]`` give the register values their scale.
    """
    codes = Codes(model.config.max_frames, rows, columns)
    for part, kind in ((model.encoder, PATCH), (model.decoder, FINE)):
        place_patches(part, codes)
        for block in part.blocks:
            aim(block.attn, codes, kind)
    _place_registers(model, codes)
    follow_input(model.decoder, codes)
    spread_values(model.encoder, latents)


@torch.no_grad()
def follow_input(decoder, codes: Codes) -> None:
    """Every branch counts from the start, and the first velocity follows the decoder's input, as t = 1 wants it."""
    for block in decoder.blocks:
        # gate_attn, gate_mlp
        block.adaLN_modulation[1].bias.view(2, 6, -1)[:, :2] = 1
    # the norm before the head divides by the deviation of an embedded patch and its five codes
    deviation = math.sqrt((decoder.patch_embed.in_features + 5 * AMPLITUDE**2) / decoder.patch_embed.out_features)
    decoder.head.weight.zero_()
    decoder.head.weight[:, codes.count :] = deviation * decoder.patch_embed.weight[codes.count :].T


@torch.no_grad()
def spread_values(encoder, latents: torch.Tensor) -> None:
    """Register values of ``latents`` get mean 0 and the deviation VALUE_STD."""
    values, head = encoder(list(latents)), encoder.head
    scale = VALUE_STD / values.std(0)
    head.weight *= scale[:, None]
    head.bias -= values.mean(0) * scale


def _reversed(n: int) -> int:
    return int(f"{n:08b}"[::-1], 2)


def _part(length: int, parts: int, i: int) -> range:
    return range(i * length // parts, (i + 1) * length // parts)


@torch.no_grad()
def place_patches(part, codes: Codes) -> None:
    """Patches of the encoder or decoder ``part`` start with the codes of their places; their latents in the other
    channels."""
    n, table, weight = codes.count, part.patch_posemb.table, part.patch_embed.weight
    weight[:n] = 0
    weight[n:] = torch.linalg.qr(torch.randn_like(weight[n:])).Q
    table[:, :, :n] = 0
    for i in range(codes.frames):
        table[0, 0, :n, i] = AMPLITUDE * codes((CONSTANT, PATCH), i)
    for i in range(codes.rows):
        table[1, 0, :n, i] = AMPLITUDE * codes(rows=(i,))
    for i in range(codes.columns):
        table[2, 0, :n, i] = AMPLITUDE * codes(columns=(i,))


def _place_registers(model: Tokenizer, codes: Codes) -> None:
    n, decoder, places = codes.count, model.decoder, []
    for rows, columns in regions(model.registers, codes.rows, codes.columns):
        kind = FINE if len(rows) * len(columns) == 1 else COARSE
        places.append(AMPLITUDE * codes((kind,), None, rows, columns))
    table = decoder.register_posemb.table
    decoder.code_embed.weight[:n] = 0
    table[:, :, :n] = 0
    table[1, 0, :n, : model.registers] = torch.stack(places, 1)
    for i in range(codes.frames):
        frame = AMPLITUDE * codes((CONSTANT,), i)
        table[0, 0, :n, i] = frame
        model.encoder.registers[i, :, :n] = frame + torch.stack(places)


@torch.no_grad()
def aim(attention, codes: Codes, kind: int) -> None:
    """Head 0 starts looking for tokens of ``kind`` at its own place, the last head for those one frame earlier, head 1
    of a decoder for registers of larger regions."""
    n, dim, first = codes.count, attention.head_dim, KINDS + codes.frames
    # orthonormal columns of mean 0: the norms of q and k keep their angles
    random = torch.randn(dim, n)
    basis = torch.linalg.qr(random - random.mean(0)).Q
    aims = {0: (kind, 0), attention.heads - 1: (kind, 1)}
    if kind == FINE:
        aims[1] = (COARSE, 0)
    key = torch.eye(n)
    key[CONSTANT] = 0
    for head, (wanted, back) in aims.items():
        query = torch.zeros(n, n)
        query[wanted, CONSTANT] = 1
        query[KINDS:first, KINDS:first] = torch.diag(torch.ones(codes.frames - back), back)
        query[first:, first:] = torch.eye(n - first)
        rows = slice(head * dim, (head + 1) * dim)
        for linear, matrix in ((attention.wq, query), (attention.wk, key)):
            linear.weight[rows] = 0
            linear.weight[rows, :n] = basis @ matrix
