"""Draws docs/masks.png: who sees whom under each mask, for one sequence of three frames.

python docs/draw_masks.py [FILE]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from flexkernels import SequenceLayout

# (patches, registers) of each frame
FRAMES = [(4, 3)] * 3
LAYOUTS = {
    "full": ("full", None),
    "causal": ("causal", None),
    "frame_causal": ("frame_causal", None),
    "frame_causal_prefix": ("frame_causal_prefix", None),
    "frame_causal_prefix,\nregister_to_register: causal": ("frame_causal_prefix", {"register_to_register": "causal"}),
    "frame_causal_prefix,\nregister_to_prefix: none": ("frame_causal_prefix", {"register_to_prefix": "none"}),
}
COLORS = ("white", "tab:blue", "tab:orange")


def draw(path: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(10, 7.2), layout="constrained")
    for axis, (title, (mask, cross)) in zip(axes.flat, LAYOUTS.items(), strict=True):
        layout = SequenceLayout([FRAMES], mask, cross)
        # 0 unseen, 1 a patch as key, 2 a register as key
        seen = layout.visible().numpy() * np.where(layout.rank.numpy() < 0, 1, 2)
        axis.imshow(seen, cmap=ListedColormap(COLORS), vmin=0, vmax=2)
        axis.set_title(title, fontsize=10)
        decorate(axis, layout.total)
    for axis in axes[:, 0]:
        axis.set_ylabel("query")
    for axis in axes[1]:
        axis.set_xlabel("key")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS[1:]]
    figure.legend(
        handles, ("a patch is seen", "a register is seen"), loc="outside lower center", ncols=2, frameon=False
    )
    figure.savefig(path, dpi=100)


def decorate(axis, total: int) -> None:
    """Thin lines between tokens, thick ones between frames, and what each token is: p a patch, r a register."""
    axis.set_xticks(np.arange(total + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(total + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="0.85", linewidth=0.6)
    axis.tick_params(which="both", length=0)
    names = [name for patches, registers in FRAMES for name in "p" * patches + "r" * registers]
    axis.set_xticks(range(total), names, fontsize=7)
    axis.set_yticks(range(total), names, fontsize=7)
    at = -0.5
    for patches, registers in FRAMES[:-1]:
        at += patches + registers
        axis.axhline(at, color="black", linewidth=1.2)
        axis.axvline(at, color="black", linewidth=1.2)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("masks.png"))
