"""What the first tokens of a clip carry: a clip with the first k tokens of each latent frame of another clip.

    python bench/swap.py [--clips 64] [--plot docs/swap.png]

Prints for each k how far the picture moves towards the other clip's: the share of the way between the two
reconstructions, and that of the way between their mean colours, frame by frame. Means over held-out clips, each paired
with the next.
"""

import argparse
from pathlib import Path

import torch

import vft
from vft.commands.options import at_least
from vft.evaluate import HELD_OUT_SEED, budgets
from vft.files import replacing
from vft.train.procedural import batch
from vft.video import contact_sheet, to_uint8

# clips of the picture
SHOWN = (3, 4)


def swapped(own: list[torch.Tensor], other: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    return [torch.cat([b[:, :k], a[:, k:]], 1) for a, b in zip(own, other, strict=True)]


def share(moved: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> float:
    """Of the way from ``own`` to ``other``, each ``[B, ...]``, that ``moved`` has gone along it; the mean over B."""
    way, gone = (other - own).flatten(1), (moved - own).flatten(1)
    return float(((gone * way).sum(1) / way.square().sum(1)).mean())


def shares(model, ids: list[torch.Tensor], keeps) -> dict[int, tuple[float, float]]:
    """{k: (share of the picture, share of the mean colours)}."""
    other = ids[1:] + ids[:1]
    decode = lambda rows: model.codec.decode(torch.stack(model.decode_latents(rows)))  # noqa: E731
    colour = lambda video: video.mean((3, 4))  # noqa: E731
    a, b = decode(ids), decode(other)
    found = {}
    for k in keeps:
        moved = decode(swapped(ids, other, k))
        found[k] = share(moved, a, b), share(colour(moved), colour(a), colour(b))
    return found


def picture(model, ids: list[torch.Tensor], path: Path) -> None:
    first, second = (ids[i] for i in SHOWN)
    shown = {"a clip": first, "another": second}
    for k in (1, 8):
        shown[f"the first with\n{k} token{'s' * (k > 1)} a frame\nof the other"] = swapped([first], [second], k)[0]
    decode = lambda rows: to_uint8(model.codec.decode(torch.stack(model.decode_latents([rows]))))  # noqa: E731
    with replacing(path) as temporary:
        contact_sheet([(name, decode(rows)) for name, rows in shown.items()]).save(temporary, "png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clips", type=at_least(1 + max(SHOWN)), default=64)
    parser.add_argument("--plot", type=Path, help="picture of two clips, and of one with tokens of the other")
    args = parser.parse_args()
    model = vft.Tokenizer.from_pretrained(args.model)
    ids = model.encode_latents(model.codec.encode(batch(HELD_OUT_SEED, range(args.clips), model.size)))
    print("tokens of the other clip | share of the picture | share of the mean colour")
    for k, (whole, colour) in shares(model, ids, budgets(model.registers)).items():
        print(f"{k:>24} | {whole:>20.3f} | {colour:>24.3f}")
    if args.plot:
        picture(model, ids, args.plot)


if __name__ == "__main__":
    main()
