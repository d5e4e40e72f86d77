"""adaLN modulations of a whole schedule, computed before the loop that needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layers import Decoder, Modulation

# a full-size decoder (width 1792, 28 blocks) needs 1.2 MB a time in bfloat16, so 50 steps fit with room to spare
LIMIT_BYTES = 256 * 2**20


class ModulationTable:
    """``table[i]`` is the modulation at ``times[i]``: one product a block for as many times as fit into `limit` bytes.

    bytes: of the rows held at a time.
    """

    def __init__(self, decoder: Decoder, times: Sequence[float], limit: int = LIMIT_BYTES) -> None:
        self.decoder = decoder
        weight = decoder.head.weight
        self.times = torch.tensor(times, dtype=torch.float32, device=weight.device)
        row = (12 * len(decoder.blocks) + 4) * decoder.config.decoder.width * weight.element_size()
        self.held = max(1, min(len(times), limit // row))
        self.bytes = self.held * row
        self.first, self.rows = None, None

    def __getitem__(self, i: int) -> Modulation:
        first = i // self.held * self.held
        if first != self.first:
            self.first, self.rows = first, self.decoder.modulation(self.times[first : first + self.held])
        rows = slice(2 * (i - first), 2 * (i - first) + 2)
        return Modulation(self.rows.blocks[:, rows], self.rows.head[rows])
