"""Pictures of results, with matplotlib (the ``plot`` extra), which is imported only where a picture is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .files import replacing
from .train import state

METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "gmsd": "GMSD (lower is better)"}


def figure(width: float, height: float):
    """An empty matplotlib figure, inches. Raises ImportError saying what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'flexkernels[plot]'") from error
    return Figure((width, height), layout="constrained")


def training_loss(folder: Path, output: Path) -> None:
    """Draws the loss of each step of the run in ``folder``, and its running mean over 2% of the steps.

    Raises ImportError without matplotlib, ValueError where ``folder`` is no run or has no step yet.
    """
    log = state.read_log(folder)
    if not log:
        raise ValueError(f"the run in {folder} has no step yet")
    page = figure(8, 4.5)
    axes = page.subplots()
    _loss(axes, [(line["step"], line["loss"]) for line in log])
    axes.set(title=f"{folder.name}: {log[-1]['clips_per_second']:.3g} clips/s")
    _save(page, output)


def evaluation(result: dict, output: Path) -> None:
    """Draws the result of ``vft eval``: metrics over registers, what registers control, loss, and how
    often clips show the class or the words asked for."""
    losses = result.get("training_loss", {})
    count = len(METRICS) + 1 + len(losses) + sum(name in result for name in ("class_accuracy", "word_accuracy"))
    page = figure(4 * ((count + 1) // 2), 7)
    axes = iter(page.subplots(2, (count + 1) // 2).flat)
    for metric, title in METRICS.items():
        _rate_distortion(next(axes), result["rate_distortion"], metric, title)
    shares = result["control"]
    axis = next(axes)
    axis.bar(range(len(shares)), shares)
    axis.set(title="Share that a register controls", xlabel="register")
    for name, curve in losses.items():
        _loss(next(axes), curve, f"Training loss, {name}")
    if "class_accuracy" in result:
        axis = next(axes)
        bars = axis.bar(result["class_accuracy"].keys(), result["class_accuracy"].values())
        axis.bar_label(bars, fmt="{:.0%}")
        axis.tick_params("x", labelrotation=20)
        axis.set(title="Class accuracy of clips", ylim=(0, 1.05))
    if "word_accuracy" in result:
        _words(next(axes), result["word_accuracy"])
    for axis in axes:
        axis.set_axis_off()
    _save(page, output)


def _words(axis, rows: dict[str, dict[str, float]]) -> None:
    """Bars of one colour for each question, side by side for each kind of clips."""
    questions = list(next(iter(rows.values())))
    width = 0.8 / len(questions)
    for i, question in enumerate(questions):
        places = [place + (i - (len(questions) - 1) / 2) * width for place in range(len(rows))]
        axis.bar(places, [row[question] for row in rows.values()], width, label=question)
    axis.set_xticks(range(len(rows)), rows.keys(), rotation=20)
    axis.set(title="Clips that show what words name", ylim=(0, 1.05))
    axis.legend(fontsize=8)


def comparison(rows: Sequence[dict], output: Path) -> None:
    """Draws rows of :func:`vft.evaluate.comparison`: a picture for each metric, a line over k for each model."""
    metrics = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in ("model", "k")]
    models: dict[str, dict[str, dict]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["k"]] = row
    page = figure(4 * len(metrics), 3.5)
    for axis, metric in zip(page.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
        curves = {name: {k: row for k, row in curve.items() if metric in row} for name, curve in models.items()}
        _rate_distortion(
            axis, {name: c for name, c in curves.items() if c}, metric, METRICS.get(metric, metric.upper())
        )
    _save(page, output)


def running_mean(values: list[float], width: int) -> list[float]:
    """The mean of the last ``width`` values at each of them."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means


def _rate_distortion(axis, curves: dict, metric: str, title: str) -> None:
    for name, rows in curves.items():
        keeps = [k for k in rows if k != "codec"]
        (line,) = axis.plot([int(k) for k in keeps], [rows[k][metric] for k in keeps], "o-", label=name)
        if "codec" in rows:
            axis.axhline(rows["codec"][metric], color=line.get_color(), linestyle=":", label="codec alone")
    axis.set_xscale("log", base=2)
    axis.set(title=title, xlabel="registers kept of each latent frame")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _loss(axis, curve: list[tuple[int, float]], title: str = "Training loss") -> None:
    steps, losses = zip(*curve, strict=True)
    axis.plot(steps, losses, alpha=0.3, label="loss")
    axis.plot(steps, running_mean(losses, max(1, len(losses) // 50)), label="running mean")
    axis.set(title=title, xlabel="step")
    axis.legend(fontsize=8)


def _save(page, output: Path) -> None:
    with replacing(output) as temporary:
        page.savefig(temporary, format=os.path.splitext(output)[1].lstrip(".") or "png", dpi=110)
