"""Pictures of results; the only file that imports matplotlib (the ``plot`` extra)."""

from __future__ import annotations

from pathlib import Path

from .files import replacing

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ValueError('plots need matplotlib: pip install "flexkernels[plot]"') from error

METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "gmsd": "GMSD (lower is better)"}


def evaluation(result: dict, path: Path) -> None:
    """The result of ``vft eval`` as one picture: metrics over registers, what registers control, loss, classes."""
    more = [name for name in ("training_loss", "class_accuracy") if name in result]
    count = len(METRICS) + 1 + len(more)
    figure = Figure((4 * ((count + 1) // 2), 7), layout="constrained")
    axes = iter(figure.subplots(2, (count + 1) // 2).flat)
    for metric, title in METRICS.items():
        _rate_distortion(next(axes), result["rate_distortion"], metric, title)
    shares = result["control"]
    axis = next(axes)
    axis.bar(range(len(shares)), shares)
    axis.set(title="Share that a register controls", xlabel="register")
    if "training_loss" in more:
        axis = next(axes)
        axis.plot(*zip(*result["training_loss"], strict=True))
        axis.set(title="Training loss", xlabel="step", yscale="log")
    if "class_accuracy" in more:
        axis = next(axes)
        bars = axis.bar(result["class_accuracy"].keys(), result["class_accuracy"].values())
        axis.bar_label(bars, fmt="{:.0%}")
        axis.set(title="Class accuracy of clips", ylim=(0, 1.05))
    for axis in axes:
        axis.set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


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
