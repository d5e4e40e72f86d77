"""``vft eval``: what a tokenizer's tokens are worth, and whether a generator makes what it is asked for.

Rate and distortion over the number of registers kept, on procedural clips that no embedded model was trained on and on
video files; what each register controls; whether generated clips show the class or the words that were asked for.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from . import progress, words
from .features import Network, frechet_distance
from .files import replacing
from .generator import Generator, time_first
from .metrics import METRICS
from .tokenizer import Tokenizer
from .train import classifier, named, procedural
from .video import preprocess, read_video

# training, and fitting the embedded codec, use other seeds
HELD_OUT_SEED = 2_000_000
BATCH = 16
# sequences whose logits over all ids are in memory at once
ROWS = 8
# clips for which the classifier is trained in full
FULL_CLIPS = 256
# of the tokens of generated clips, 1 for none
GUIDANCES = (1.0, 2.0, 4.0)


def budgets(registers: int) -> list[int]:
    """1, 2, 4, ... and all registers."""
    return sorted({2**i for i in range(registers.bit_length()) if 2**i <= registers} | {registers})


def held_out(model: Tokenizer, count: int, keeps: Sequence[int], **options) -> dict[str, dict[str, float]]:
    """Mean metrics of ``count`` held-out clips for each k, with the :func:`rate`, and under "codec" those of the latent
    codec alone, with the refiner of a checkpoint that has one.

    ``options`` (steps, guidance, ...) go to ``model.decode_latents``.
    """
    rows: dict[str, list[dict]] = {}
    every: list[torch.Tensor] = []
    for start in progress.bar(range(0, count, BATCH), desc="held-out clips", unit="batch"):
        clips = _clips(model, range(start, min(start + BATCH, count)))
        latents = model.codec.encode(clips)
        ids = model.encode_latents(latents)
        decoded = {"codec": latents}
        for k in keeps:
            decoded[str(k)] = torch.stack(model.decode_latents(ids, k, seed=start, **options))
        for name, z in decoded.items():
            video = model.codec.decode(z)
            rows.setdefault(name, []).append({metric: f(video, clips) for metric, f in METRICS.items()})
        every += ids
    means = {name: _means(parts) for name, parts in rows.items()}
    pixels, codes = count * clips[0, 0].numel(), math.prod(model.config.levels)
    for k in keeps:
        means[str(k)] |= rate(torch.cat(every)[:, :k], pixels, codes)
    return means


def rate(ids: torch.Tensor, pixels: int, codes: int) -> dict[str, float]:
    """Of ids ``[latent frames, k]`` of videos of so many pixels in all: ``bits_per_pixel`` at 16 bits an id, as files
    hold them, and ``codebook_use``, the share of the codes that occur."""
    return {
        "bits_per_pixel": round(16 * ids.numel() / pixels, 6),
        "codebook_use": round(len(ids.unique()) / codes, 6),
    }


def distances(model: Tokenizer, networks: Sequence[Network], count: int, keeps: Sequence[int], **options) -> dict:
    """Distances of reconstructions to the first ``count`` held-out clips in the networks' feature spaces.

    Returns {"protocol": what was compared, "rows": {k, and "codec" for the latent codec alone: {metric: value}}}.
    ``options`` go to ``model.decode_latents``. Raises ValueError for fewer than two clips.
    """
    if count < 2:
        raise ValueError(f"clips must be at least 2, got {count}")
    real: dict[str, list[torch.Tensor]] = {}
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    for start in progress.bar(range(0, count, BATCH), desc="features", unit="batch"):
        clips = _clips(model, range(start, min(start + BATCH, count)))
        latents = model.codec.encode(clips)
        ids = model.encode_latents(latents)
        decoded = {"codec": latents}
        decoded |= {str(k): torch.stack(model.decode_latents(ids, k, seed=start, **options)) for k in keeps}
        videos = {name: model.codec.decode(z) for name, z in decoded.items()}
        for network in networks:
            if network.kind != "lpips":
                real.setdefault(network.kind, []).append(network.features(clips))
            for name, video in videos.items():
                part = network.distances(video, clips) if network.kind == "lpips" else network.features(video)
                found.setdefault(name, {}).setdefault(network.kind, []).append(part)
    rows = {
        name: {
            kind: float(parts.mean()) if kind == "lpips" else frechet_distance(parts, torch.cat(real[kind]))
            for kind, parts in ((kind, torch.cat(parts)) for kind, parts in kinds.items())
        }
        for name, kinds in found.items()
    }
    protocol = {
        "data": "procedural, held out", "seed": HELD_OUT_SEED, "clips": count, "frames": model.config.chunk_size,
        "stride": 1, "size": model.size, "range": [-1, 1], "batch": BATCH,
        "networks": {network.kind: network.protocol for network in networks},
    }  # fmt: skip
    return {"protocol": protocol, "rows": rows}


def read_result(path: Path) -> dict:
    """A result that ``vft eval`` wrote. Raises ValueError for another file, OSError where it cannot be read."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        comparison([result])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result of vft eval") from error
    return result


def comparison(results: Sequence[dict]) -> list[dict]:
    """A row for each model and k of results of ``vft eval``: model, k, every metric on the held-out clips, and ViCLIP's
    score of the captioned videos."""
    rows = []
    for result in results:
        more = [result.get(name, {"rows": {}})["rows"] for name in ("distances", "captions")]
        for k, values in result["rate_distortion"]["held-out clips"].items():
            rows.append({"model": result["model"], "k": k, **values, **more[0].get(k, {}), **more[1].get(k, {})})
    return rows


def write_table(rows: Sequence[dict], path: Path) -> None:
    """Writes rows as CSV or, for a path in .md, as a Markdown table; a column that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[f"{v:.6g}" if isinstance(v, float) else str(v) for v in (row.get(n, "") for n in names)] for row in rows]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".md":
            for line in (names, ["---"] * len(names), *cells):
                file.write(f"| {' | '.join(line)} |\n")
        else:
            csv.writer(file).writerows([names, *cells])


def one_video(
    model: Tokenizer, path: Path, keeps: Sequence[int], captions: Network | None = None, **options
) -> dict[str, dict[str, float]]:
    """Metrics of a video file for each k, at the model's working size; with ``captions`` also its score there."""
    video = read_video(path, model.size)
    source = preprocess(video.frames, model.size)[None]
    tokens = model.encode(video)
    decoded = {k: model.decode(tokens, keep=k, **options) for k in keeps}
    rows = {str(k): _means([{name: f(v, source) for name, f in METRICS.items()}]) for k, v in decoded.items()}
    if captions is not None:
        for k, v in decoded.items():
            rows[str(k)][captions.kind] = captions.similarity(v, path.name)
    return rows


def caption_scores(
    model: Tokenizer, captions: Network, paths: Sequence[Path], rows: dict[str, dict[str, dict[str, float]]]
) -> dict:
    """How near videos are to their captions: means over files of what :func:`one_video` gave for them, by name.

    Returns {"protocol": what was compared, "rows": {k, and "source" for the videos themselves: {"viclip": mean}}}.
    """
    own, frames = [], []
    for path in paths:
        video = read_video(path, model.size)
        frames.append(len(video.frames))
        own.append(captions.similarity(preprocess(video.frames, model.size)[None], path.name))
    scores = {"source": own} | {k: [rows[path.name][k][captions.kind] for path in paths] for k in rows[paths[0].name]}
    protocol = {
        "score": "cosine, unscaled", "videos": [path.name for path in paths], "frames": frames, "stride": 1,
        "size": model.size, "range": [-1, 1], "networks": {captions.kind: captions.protocol},
    }  # fmt: skip
    return {"protocol": protocol, "rows": {k: {captions.kind: sum(s) / len(s)} for k, s in scores.items()}}


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


def subject(generator: Generator) -> classifier.Subject:
    """What a generator can be asked for, and its clips judged by: motion families, or captions of known words.

    Raises ValueError for a generator of other captions or classes.
    """
    config = generator.config
    if config.cond == "text":
        if config.ctx_dim != words.WIDTH:
            raise ValueError(
                f"generator {generator.name!r} must have captions of vft.words, {words.WIDTH} channels, to be judged, "
                f"got {config.ctx_dim}"
            )
        return classifier.NAMED
    if config.n_classes != len(procedural.FAMILIES) or (config.classes or procedural.FAMILIES) != procedural.FAMILIES:
        raise ValueError(
            f"generator {generator.name!r} must have the classes {', '.join(procedural.FAMILIES)} to be judged, got "
            f"{', '.join(config.classes) or f'{config.n_classes} classes'}"
        )
    return classifier.MOTION


@torch.no_grad()
def generator_loss(generator: Generator, tokenizer: Tokenizer, count: int) -> float:
    """Cross-entropy in nats a token of ``count`` held-out clips, given their classes or captions.

    A training run logs that of clips it has seen: where it is far lower, more different clips (``--clips``) would
    help.
    """
    kind, losses = subject(generator), []
    for start in progress.bar(range(0, count, ROWS), desc="generator's loss", unit="batch"):
        indices = range(start, min(start + ROWS, count))
        clips = kind.clips(HELD_OUT_SEED, indices, tokenizer.size, tokenizer.config.chunk_size, torch.get_num_threads())
        ids = torch.stack([tokenizer.encode(clip[None]).ids for clip in clips]).long()
        flat = time_first(ids[:, :, : generator.config.tokens_per_frame(ids.shape[1])]).to(generator.device)
        if kind is classifier.NAMED:
            condition = _captions(indices)
        else:
            condition = {"class_id": kind.labels(HELD_OUT_SEED, indices)[:, 0].tolist()}
        logits = generator.logits(flat, **condition)
        losses.append(F.cross_entropy(logits.transpose(1, 2), flat, reduction="none"))
    return float(torch.cat(losses).mean())


def judge(
    model: Tokenizer, count: int, subject: classifier.Subject = classifier.MOTION
) -> tuple[classifier.Classifier, dict[str, int]]:
    """The classifier that is asked about ``count`` clips, and what it learned from; its training is announced, and
    shorter where there is less to judge."""
    share = min(1.0, count / FULL_CLIPS)
    facts = {"steps": max(100, round(classifier.STEPS * share)), "clips": max(500, round(classifier.CLIPS * share))}
    print(
        f"vft: training a classifier of {' and '.join(subject.questions)} on {facts['clips']} procedural clips, "
        f"{facts['steps']} steps: it says what generated clips show",
        file=sys.stderr,
    )
    return classifier.train(model.size, model.config.chunk_size, **facts, subject=subject), facts


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

    def asked(part: slice) -> dict:
        return {"class_id": labels[part].tolist()}

    generated = {}
    for guidance in guidances:
        ids = _generated(generator, tokenizer, count, asked, guidance, **options)
        generated[_name(guidance)] = judge.accuracy(_decoded(tokenizer, ids), labels)
    real_labels = torch.tensor([procedural.label(HELD_OUT_SEED, i) for i in range(count)])
    real = _clips(tokenizer, range(count))
    return {
        "held_out": judge.accuracy(real, real_labels),
        "reconstructed": judge.accuracy(_reconstructed(tokenizer, real, ids[0].shape[1]), real_labels),
        **generated,
    }


def word_accuracy(
    generator: Generator, tokenizer: Tokenizer, judge: classifier.Classifier, count: int,
    guidances: Sequence[float] = GUIDANCES, **options,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """How often clips show the colour, the shape and the motion that their captions name, and all three: held-out
    clips of :mod:`vft.train.named`, the same through the tokenizer, and those generated for their captions.

    Arguments are those of :func:`class_accuracy`.
    """
    subject, indices = classifier.NAMED, range(count)
    labels = subject.labels(HELD_OUT_SEED, indices)

    def shares(video: torch.Tensor) -> dict[str, float]:
        right = judge.right(video, labels)
        columns = {**dict(zip(subject.questions, right.unbind(1), strict=True)), "all": right.all(1)}
        return {name: float(column.float().mean()) for name, column in columns.items()}

    captions = _captions(indices)

    def asked(part: slice) -> dict:
        return {name: value[part] for name, value in captions.items()}

    generated = {}
    for guidance in guidances:
        ids = _generated(generator, tokenizer, count, asked, guidance, **options)
        generated[_name(guidance)] = shares(_decoded(tokenizer, ids))
    size, frames = tokenizer.size, tokenizer.config.chunk_size
    real = subject.clips(HELD_OUT_SEED, indices, size, frames, torch.get_num_threads())
    seen = _reconstructed(tokenizer, real, ids[0].shape[1])
    return {"held_out": shares(real), "reconstructed": shares(seen), **generated}


def _captions(indices) -> dict[str, torch.Tensor]:
    """Of held-out named clips, as a generator takes them."""
    emb, mask = words.embed([named.caption(HELD_OUT_SEED, i) for i in indices])
    return {"text_emb": emb, "text_mask": mask}


def _generated(generator: Generator, tokenizer: Tokenizer, count: int, asked, guidance: float, **options) -> list:
    """Ids of ``count`` clips of the tokenizer's length; ``asked(slice)`` are the conditions of a part of them."""
    frames = tokenizer.codec.latent_shape(tokenizer.config.chunk_size, tokenizer.size, tokenizer.size)[1]
    ids: list[torch.Tensor] = []
    for start in range(0, count, BATCH):
        part = asked(slice(start, min(start + BATCH, count)))
        ids += generator.generate(**part, frames=frames, seed=start, guidance=guidance, **options)
    return ids


def _name(guidance: float) -> str:
    return "generated" if guidance == 1 else f"guidance {guidance:g}"


def _reconstructed(tokenizer: Tokenizer, clips: torch.Tensor, keep: int) -> torch.Tensor:
    """Clips through the tokenizer, by as many registers as a generator gives."""
    return _decoded(tokenizer, [i[:, :keep] for i in tokenizer.encode_latents(tokenizer.codec.encode(clips))])


def _decoded(tokenizer: Tokenizer, ids: list[torch.Tensor]) -> torch.Tensor:
    parts = [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]
    return torch.cat([tokenizer.codec.decode(torch.stack(tokenizer.decode_latents(part))) for part in parts])


def _clips(model: Tokenizer, indices) -> torch.Tensor:
    return procedural.batch(HELD_OUT_SEED, indices, model.size, model.config.chunk_size, torch.get_num_threads())


def _means(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    return {name: round(float(torch.cat([part[name] for part in parts]).mean()), 4) for name in parts[0]}


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
    if "generator_loss" in result:
        lines.append(f"generator, nats a token of held-out clips: {result['generator_loss']:.3f}")
    for name, accuracy in result.get("class_accuracy", {}).items():
        lines.append(f"class accuracy, {name}: {accuracy:.3f}")
    for name, accuracies in result.get("word_accuracy", {}).items():
        lines.append(f"words shown, {name}: {', '.join(f'{word} {share:.3f}' for word, share in accuracies.items())}")
    return "\n".join(lines)
