"""A solver's update without guidance, for states of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..flow import flow_update

# rows mean nothing without guidance; kernels share them out, so a tensor is cut into at most this many
ROWS = 64


def unguided_update(
    x: torch.Tensor, velocity: torch.Tensor, b: float, past: Sequence[torch.Tensor] = (), past_b: Sequence[float] = ()
) -> torch.Tensor:
    """x + b * velocity + sum past_b_j past_j in x's dtype; velocity and the float32 past velocities have x's shape."""
    if x.numel() == 0:
        return x
    rows = (1, math.gcd(x.numel(), ROWS), -1)
    x_row, v_row, *past_rows = (value.reshape(rows) for value in (x, velocity, *past))
    return flow_update((x_row,), (1.0,), v_row, b=b, past=past_rows, past_b=past_b)[0].view(x.shape)
