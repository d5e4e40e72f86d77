"""``vft eval``: what a tokenizer's tokens are worth, and whether a generator makes what it is asked for.

Rate and distortion over the number of registers kept, on procedural clips that no embedded model was trained on and on
video files; what each register controls; the class accuracy of generated clips.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import plots
from .demo import CLIP
from .files import check_output, replacing
from .generator import Generator
from .tokenizer import Tokenizer
from .train import classifier, procedural, state
from .video import preprocess, read_video

# training, and fitting the embedded codec, use other seeds
HELD_OUT_SEED = 2_000_000
BATCH = 16
# SSIM (Wang et al. 2004): a Gaussian window, and (0.01 L)^2, (0.03 L)^2 for values of range L = 1
WINDOW, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2
# of the tokens of generated clips, 1 for none
GUIDANCES = (1.0, 2.0, 4.0)
# GMSD (Xue et al. 2014): the constant for values of range 1
GMSD_C = 170 / 255**2


def psnr(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """dB of each clip ``[B]``, from ``[B, 3, T, H, W]`` in [-1, 1]; higher is better."""
    return -10 * ((video.clamp(-1, 1) - reference) / 2).square().mean((1, 2, 3, 4)).log10()


def ssim(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each clip's luma ``[B]``, frame by frame (Wang et al. 2004); 1 is equal.

    Raises ValueError for frames smaller than the window of 11 x 11.
    """
    x, y = _luma(video), _luma(reference)
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"frames must be at least {WINDOW}x{WINDOW}, got {x.shape[-2]}x{x.shape[-1]}")
    bell = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    bell = (bell / bell.sum()).to(x)
    blur = lambda z: F.conv2d(F.conv2d(z, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))  # noqa: E731
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    similarity = (2 * mx * my + C1) * (2 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return similarity.mean((1, 2, 3)).view(len(video), -1).mean(1)


def gmsd(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude similarity deviation of each clip's luma ``[B]`` (Xue et al. 2014), a perceptual distance
    without learned weights; 0 is equal."""
    prewitt = torch.tensor([[1.0, 0, -1]] * 3, device=video.device) / 3
    kernels = torch.stack([prewitt, prewitt.T])[:, None]

    def magnitude(z: torch.Tensor) -> torch.Tensor:
        gradients = F.conv2d(F.avg_pool2d(_luma(z), 2), kernels.to(z.dtype), padding=1)
        return gradients.square().sum(1).sqrt()

    a, b = magnitude(video), magnitude(reference)
    similarity = (2 * a * b + GMSD_C) / (a * a + b * b + GMSD_C)
    return similarity.flatten(1).std(1, correction=0).view(len(video), -1).mean(1)


def _luma(video: torch.Tensor) -> torch.Tensor:
    # [B, 3, T, H, W] in [-1, 1] -> [B * T, 1, H, W] in [0, 1], ITU-R BT.601
    weight = torch.tensor([0.299, 0.587, 0.114], device=video.device, dtype=video.dtype).view(1, 3, 1, 1, 1)
    return ((video.clamp(-1, 1) + 1) / 2 * weight).sum(1).flatten(0, 1)[:, None]


METRICS: dict[str, Callable] = {"psnr": psnr, "ssim": ssim, "gmsd": gmsd}


def budgets(registers: int) -> list[int]:
    """1, 2, 4, ... and all registers."""
    return sorted({2**i for i in range(registers.bit_length()) if 2**i <= registers} | {registers})


def held_out(model: Tokenizer, count: int, keeps: Sequence[int], **options) -> dict[str, dict[str, float]]:
    """Mean metrics of ``count`` held-out clips for each k, and under "codec" those of the latent codec alone.

    ``options`` (steps, guidance, ...) go to ``model.decode_latents``.
    """
    rows: dict[str, list[dict]] = {}
    for start in tqdm(range(0, count, BATCH), desc="clips", leave=False, disable=not sys.stderr.isatty()):
        clips = _clips(model, range(start, min(start + BATCH, count)))
        latents = model.codec.encode(clips)
        ids = model.encode_latents(latents)
        decoded = {"codec": latents}
        for k in keeps:
            decoded[str(k)] = torch.stack(model.decode_latents(ids, k, seed=start, **options))
        for name, z in decoded.items():
            video = model.codec.decode(z)
            rows.setdefault(name, []).append({metric: f(video, clips) for metric, f in METRICS.items()})
    return {name: _means(parts) for name, parts in rows.items()}


def one_video(model: Tokenizer, path: Path, keeps: Sequence[int], **options) -> dict[str, dict[str, float]]:
    """Metrics of a video file for each k, at the model's working size."""
    video = read_video(path, model.size)
    source = preprocess(video.frames, model.size)[None]
    tokens = model.encode(video)
    decoded = {k: model.decode(tokens, keep=k, **options) for k in keeps}
    return {str(k): _means([{name: f(v, source) for name, f in METRICS.items()}]) for k, v in decoded.items()}


def control(model: Tokenizer, count: int, **options) -> list[float]:
    """How far swapping register r between two clips moves the reconstruction towards the other clip's, for each r.

    The share of the way, along the line from one full reconstruction to the other: 0 where the register says nothing,
    1 where it says all. Means over ``count`` clips, each paired with the next.
    """
    clips = _clips(model, range(count))
    ids = model.encode_latents(model.codec.encode(clips))
    other = ids[1:] + ids[:1]

    def decode(rows: list[torch.Tensor]) -> torch.Tensor:
        return model.codec.decode(torch.stack(model.decode_latents(rows, **options))).flatten(1)

    own = decode(ids)
    way = decode(other) - own
    shares = []
    for r in range(model.registers):
        swapped = [torch.cat([a[:, :r], b[:, r : r + 1], a[:, r + 1 :]], 1) for a, b in zip(ids, other, strict=True)]
        shares.append(float((((decode(swapped) - own) * way).sum(1) / way.square().sum(1)).mean()))
    return shares


def class_accuracy(
    generator: Generator, tokenizer: Tokenizer, judge: classifier.Classifier, count: int,
    guidances: Sequence[float] = GUIDANCES, **options,
) -> dict[str, float]:  # fmt: skip
    """How often a classifier of motion families is right, on held-out clips and on as many generated ones.

    Clips are generated at each guidance scale of ``guidances`` (1: none); ``options`` (temperature, top_k, ...) go to
    ``generator.generate``. The classifier also sees held-out clips through the tokenizer, from as many registers as the
    generator gives: the most that generation can reach.
    """
    labels = torch.arange(count) % len(procedural.FAMILIES)
    shape = tokenizer.codec.latent_shape(tokenizer.config.chunk_size, tokenizer.size, tokenizer.size)
    generated = {}
    for guidance in guidances:
        ids = []
        for start in range(0, count, BATCH):
            chosen = labels[start : start + BATCH].tolist()
            ids += generator.generate(class_id=chosen, frames=shape[1], seed=start, guidance=guidance, **options)
        name = "generated" if guidance == 1 else f"guidance {guidance:g}"
        generated[name] = judge.accuracy(_decoded(tokenizer, ids), labels)
    real_labels = torch.tensor([procedural.label(HELD_OUT_SEED, i) for i in range(count)])
    real = _clips(tokenizer, range(count))
    seen = [i[:, : ids[0].shape[1]] for i in tokenizer.encode_latents(tokenizer.codec.encode(real))]
    return {
        "held_out": judge.accuracy(real, real_labels),
        "reconstructed": judge.accuracy(_decoded(tokenizer, seen), real_labels),
        **generated,
    }


def _decoded(tokenizer: Tokenizer, ids: list[torch.Tensor]) -> torch.Tensor:
    parts = [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]
    return torch.cat([tokenizer.codec.decode(torch.stack(tokenizer.decode_latents(part))) for part in parts])


def _clips(model: Tokenizer, indices) -> torch.Tensor:
    return procedural.batch(HELD_OUT_SEED, indices, model.size, model.config.chunk_size, torch.get_num_threads())


def _means(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    return {name: round(float(torch.cat([part[name] for part in parts]).mean()), 4) for name in parts[0]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vft eval`` beyond the model's."""
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves (needs matplotlib)")
    parser.add_argument("--clips", type=int, default=256, help="held-out procedural clips (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's)")
    parser.add_argument("--video", type=Path, nargs="*", default=[CLIP], help="video files (default: the shipped clip)")
    parser.add_argument("--generator", help="also measure the class accuracy of this generator ('tiny', file, folder)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of generated tokens (default: %(default)g)")
    parser.add_argument(
        "--run", dest="training_runs", type=Path, nargs="+", default=[], help="training runs whose loss to show"
    )


def run(args: argparse.Namespace, model: Tokenizer) -> None:
    """Measures as the parsed arguments say; prints a table, writes JSON and a picture.

    Raises ValueError for an argument out of range, training runs of one name or a model without a working size,
    ImportError for a plot without matplotlib.
    """
    if args.clips < 2:
        raise ValueError(f"clips must be at least 2, got {args.clips}")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {args.temperature:g}")
    if model.size is None:
        raise ValueError(f"model {model.name!r} must have a working size")
    for path in [args.output, *([args.plot] if args.plot else [])]:
        check_output(path)
    if args.plot:
        # a missing matplotlib is an error before the work
        plots.figure(1, 1)
    logs = {folder.name: state.read_log(folder) for folder in args.training_runs}
    if len(logs) < len(args.training_runs):
        raise ValueError("folders of training runs must have different names")
    steps = args.steps or model.steps
    keeps = budgets(model.registers)
    result = {
        "model": model.name, "machine": platform.machine(), "torch": torch.__version__, "dtype": "float32",
        "clips": args.clips, "steps": steps, "guidance": str(model.guidance),
        "rate_distortion": {"held-out clips": held_out(model, args.clips, keeps, steps=steps)},
        "control": control(model, min(args.clips, 64), steps=steps),
    }  # fmt: skip
    for path in args.video:
        result["rate_distortion"][path.name] = one_video(model, path, keeps, steps=steps)
    if args.generator:
        generator = Generator.from_pretrained(args.generator)
        judge = classifier.train(model.size, model.config.chunk_size)
        result["temperature"] = args.temperature
        result["class_accuracy"] = class_accuracy(generator, model, judge, args.clips, temperature=args.temperature)
    if logs:
        curves = {name: [(line["step"], line["loss"]) for line in log] for name, log in logs.items()}
        result["training_loss"] = {name: thinned(curve) for name, curve in curves.items()}
    print(table(result))
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plots.evaluation(result, args.plot)


def thinned(curve: list[tuple[int, float]], most: int = 1000) -> list[tuple[int, float]]:
    """At most ``most`` points of a loss curve: the last step and the mean loss of neighbouring steps."""
    width = -(-len(curve) // most)
    parts = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [(part[-1][0], round(sum(loss for _, loss in part) / len(part), 5)) for part in parts]


def table(result: dict) -> str:
    """The result as text."""
    lines = []
    for name, rows in result["rate_distortion"].items():
        lines.append(f"{name}\n{'k':>6} {'PSNR dB':>8} {'SSIM':>6} {'GMSD':>6}")
        lines += [f"{k:>6} {r['psnr']:>8.2f} {r['ssim']:>6.3f} {r['gmsd']:>6.3f}" for k, r in rows.items()]
    shares = " ".join(f"{share:.3f}" for share in result["control"])
    lines.append(f"share of the reconstruction that each register controls\n {shares}")
    for name, accuracy in result.get("class_accuracy", {}).items():
        lines.append(f"class accuracy, {name}: {accuracy:.3f}")
    return "\n".join(lines)
