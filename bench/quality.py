"""Rate and distortion of a tokenizer: PSNR over the number of registers kept, on held-out procedural clips and a video.

python bench/quality.py [--model tiny] [--clips 64] [--keep 1 4 16 32] [--video FILE] [--json FILE]
"""

import argparse
import json
import platform
from pathlib import Path

import torch

import vft
from vft.demo import CLIP
from vft.train import procedural
from vft.video import preprocess, read_video

# the embedded models and codec are trained on other seeds
HELD_OUT_SEED = 2_000_000
BATCH = 16


def psnr(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """dB of each clip, from [B, 3, T, H, W] in [-1, 1]."""
    return -10 * ((video.clamp(-1, 1) - reference) / 2).square().mean((1, 2, 3, 4)).log10()


def held_out(model: vft.Tokenizer, count: int, keeps: list[int], **options) -> dict[str, float]:
    """Mean PSNR of `count` held-out clips for each k, and of the latent codec alone."""
    rows: dict[str, list[torch.Tensor]] = {str(k): [] for k in keeps} | {"codec": []}
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        clips = procedural.batch(HELD_OUT_SEED, indices, model.size, model.config.chunk_size, torch.get_num_threads())
        latents = model.codec.encode(clips)
        rows["codec"].append(psnr(model.codec.decode(latents), clips))
        ids = model.encode_latents(latents)
        for k in keeps:
            decoded = model.decode_latents(ids, k, seed=start, **options)
            rows[str(k)].append(psnr(model.codec.decode(torch.stack(decoded)), clips))
    return {name: float(torch.cat(values).mean()) for name, values in rows.items()}


def one_video(model: vft.Tokenizer, path: Path, keeps: list[int], **options) -> dict[str, float]:
    """PSNR of a video file for each k, at the model's working size."""
    video = read_video(path, model.size)
    source = preprocess(video.frames, model.size)[None]
    tokens = model.encode(video)
    return {str(k): float(psnr(model.decode(tokens, keep=k, **options), source)) for k in keeps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--keep", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's)")
    parser.add_argument("--video", type=Path, default=CLIP)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = vft.Tokenizer.from_pretrained(args.model)
    options = {"steps": args.steps or model.steps}
    result = {
        "model": model.name,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "dtype": "float32",
        "clips": args.clips,
        "steps": options["steps"],
        "guidance": str(model.guidance),
        "held_out": held_out(model, args.clips, args.keep, **options),
        args.video.name: one_video(model, args.video, args.keep, **options),
    }
    print(f"{'k':>6} {'held-out dB':>12} {args.video.name + ' dB':>16}")
    for k in args.keep:
        print(f"{k:>6} {result['held_out'][str(k)]:>12.2f} {result[args.video.name][str(k)]:>16.2f}")
    print(f" codec {result['held_out']['codec']:>12.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
