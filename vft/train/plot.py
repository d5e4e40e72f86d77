"""``vft train --plot RUN -o loss.png``: the loss curve of a run."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import replacing
from . import state


def plot_loss(folder: Path, output: Path) -> None:
    """Draws the loss of each step of the run in ``folder``, and its running mean over 2% of the steps.

    Raises ImportError without matplotlib, ValueError where ``folder`` is no run or has no step yet.
    """
    log = state.read_log(folder)
    if not log:
        raise ValueError(f"the run in {folder} has no step yet")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'flexkernels[plot]'") from error
    steps, losses = ([line[key] for line in log] for key in ("step", "loss"))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, alpha=0.3, label="each step")
    axes.plot(steps, _running_mean(losses, max(1, len(losses) // 50)), label="running mean")
    axes.set(xlabel="step", ylabel="loss", title=f"{folder.name}: {log[-1]['clips_per_second']:.3g} clips/s")
    axes.legend()
    suffix = os.path.splitext(output)[1].lstrip(".") or "png"
    with replacing(output) as temporary:
        figure.savefig(temporary, format=suffix, dpi=120)


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of the last ``width`` values at each of them."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
