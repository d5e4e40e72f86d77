"""Whole models at their published size with random weights: seconds a clip of tokenizer and VAE, a generated token.

    python bench/models.py [--only NAME ...] [--json FILE] [--budget SECONDS]

Each run is a line {name, value, unit, note}, written as soon as it is there; FILE holds them as a list, as a report
does under "runs". A run that raises is a line with its error, and the next one begins.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from graphs import STANDIN
from report import chosen, write

import vft
from vft.config import make_config, parse_config, parse_generator_config
from vft.convolution import convolutions
from vft.measure import synchronize
from vft.vidtok import VidTokCodec

DEVICE = "cpu" if STANDIN or not torch.cuda.is_available() else "cuda"
DTYPE = torch.bfloat16
# released: encoder 1152 x 18, decoder 1792 x 28, 256 registers of 5 frames of 256 patches; the stand-in is a toy
TOKENIZER = (
    dict(encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, registers=8, grid=5)
    if STANDIN
    else dict(encoder_width=1152, encoder_depth=18, decoder_width=1792, decoder_depth=28, registers=256, grid=16)
)
LATENTS = (16, 5, 8, 8) if STANDIN else (16, 5, 32, 32)
STEPS, GUIDANCE = (2 if STANDIN else 40), vft.APG(25.0, 0.6)
VIDEO = (17, 8, 8) if STANDIN else (17, 256, 256)
GENERATOR = {"depth": 1, "vocab": 64, "seq_len": 40} if STANDIN else {"depth": 16, "vocab": 64000, "seq_len": 1280}


def timed(function, repeats: int) -> tuple[float, float]:
    """Seconds of a first call, which compiles and captures, and the mean of `repeats` after it."""
    start = time.perf_counter()
    function()
    synchronize(DEVICE)
    first = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(DEVICE)
    return first - start, (time.perf_counter() - first) / repeats


def seconds_of(function, repeats: int) -> float:
    return timed(function, repeats)[1]


def tokenizer():
    """Clips decoded and encoded by the tokenizer, latents in and out."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = vft.Tokenizer(parse_config(make_config(**TOKENIZER)))
    model = model.to(DEVICE, DTYPE).eval().requires_grad_(False)
    for name, p in model.decoder.named_parameters():
        # what training starts from zero
        if "modulation" in name or name.startswith("head"):
            p.copy_(0.02 * torch.randn_like(p))
    model.prepare()
    parameters = sum(p.numel() for p in model.parameters())
    note = f"{parameters / 1e9:.2f} B parameters, random weights, bf16, {STEPS} Euler steps, APG"
    registers = model.registers
    few = min(32, registers)
    few_steps = {"steps": max(1, STEPS // 2), "solver": "ab2"}
    fewer = few_steps | {"null_every": 2}
    for batch, keep, graphs, fp8, label, options in (
        (1, few, True, False, "", {}),
        (8, few, True, False, "", {}),
        (8, few, True, False, ", ab2 in half the steps", few_steps),
        (1, registers, True, False, "", {}),
        (1, few, False, False, ", no CUDA graph", {}),
        (8, few, True, True, ", fp8", {}),
        (8, few, True, True, ", fp8, ab2 in half the steps, null_every 2", fewer),
    ):
        ids = [torch.randint(model.config.codebook_size, (LATENTS[1], registers), device=DEVICE) for _ in range(batch)]
        noise = [torch.randn(LATENTS, device=DEVICE) for _ in range(batch)]
        name = f"tokenizer decode, batch {batch}, keep {keep}{label}"
        sampler = {"steps": STEPS, "guidance": GUIDANCE, "noise": noise} | options
        model.cuda_graphs = graphs
        if fp8:
            model.quantize()
        first, seconds = timed(lambda: model.decode_latents(ids, keep, **sampler), 1 if batch > 1 else 2)  # noqa: B023
        yield name, seconds / batch, "s a clip", note
        yield f"{name}, first call beside the work", first - seconds, "s", note
    for batch in (1, 8):
        latents = [torch.randn(LATENTS, device=DEVICE) for _ in range(batch)]
        seconds = seconds_of(lambda x=latents: model.encode_latents(x), 5)
        yield f"tokenizer encode, batch {batch}", 1000 * seconds / batch, "ms a clip", note
    if DEVICE == "cuda":
        yield "tokenizer, peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB", note


@torch.no_grad()
def vidtok():
    """Clips through the VAE."""
    torch.manual_seed(0)
    codec = VidTokCodec(**({"width": 32, "multipliers": (1, 1, 1, 1)} if STANDIN else {})).eval()
    for dtype, batch in ((DTYPE, 1), (DTYPE, 4), (torch.float32, 1))[2 * STANDIN :]:
        codec = codec.to(DEVICE, dtype)
        frames, height, width = VIDEO
        video = (2 * torch.rand(batch, 3, frames, height, width, device=DEVICE) - 1).to(dtype)
        latents = codec.encode(video)
        note = f"random weights, {' x '.join(map(str, VIDEO))}"
        short = "bf16" if dtype == DTYPE else "fp32"
        for what, call in (
            ("encode", lambda v=video, c=codec: c.encode(v)),
            ("decode", lambda x=latents, c=codec: c.decode(x)),
        ):
            seconds = seconds_of(call, 1 if STANDIN else 3)
            yield f"VidTok {what}, {short}, batch {batch}", 1000 * seconds / batch, "ms a clip", note
    yield from bounded(codec.to(DEVICE, DTYPE))


def bounded(codec):
    """A large clip in as many bytes as it is given, and what it takes of them."""
    codec.memory = 4 << 30
    latents = torch.randn(1, 16, *((2, 3, 2) if STANDIN else (5, 135, 240)), device=DEVICE)
    plan = codec.plan_decode(1, *latents.shape[2:])
    note = f"latents {' x '.join(map(str, latents.shape[2:]))}, memory 4 GiB, tile {plan.tile}, random weights"
    yield "VidTok decode, bf16, 4 GiB", seconds_of(lambda: codec.decode(latents), 1), "s a clip", note
    yield "VidTok decode, bf16, 4 GiB, counted", plan.bytes / 1e9, "GB", note
    if DEVICE == "cuda":
        prepared = sum(conv.prepared_bytes() for conv in convolutions(codec))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - prepared
        codec.decode(latents)
        yield "VidTok decode, bf16, 4 GiB, taken", (torch.cuda.max_memory_allocated() - before) / 1e9, "GB", note


def generator():
    """Tokens of guided samples: the first ones, with what they compile and capture, and the mean."""
    torch.manual_seed(0)
    raw = {**GENERATOR, "cond": "class", "n_classes": 600}
    with torch.device(DEVICE):
        model = vft.Generator(parse_generator_config(raw)).to(DTYPE).eval().requires_grad_(False)
    frames = 5
    tokens = frames * (4 if STANDIN else 64)
    options = {"frames": frames, "tokens_per_frame": tokens // frames, "guidance": 2.0, "temperature": 0.9}
    filters = {"top_k": min(100, GENERATOR["vocab"]), "top_p": 0.9}
    depth, vocab = GENERATOR["depth"], GENERATOR["vocab"]
    note = f"depth {depth}, vocabulary {vocab}, bf16, guidance, top-k, top-p, {tokens} tokens"
    synchronize(DEVICE)
    start = time.perf_counter()
    next(model.stream(class_id=[0], **options, **filters, seed=0))
    synchronize(DEVICE)
    yield "a new model's first token of each frame", time.perf_counter() - start, "s", note
    for batch in (1, 8, 64):
        call = lambda b=batch: model.generate(class_id=[0] * b, **options, **filters, seed=0)  # noqa: E731
        yield f"generate(), batch {batch}", 1000 * seconds_of(call, 1) / tokens, "ms a token of each sample", note


RUNS = {"tokenizer": tokenizer, "generator": generator, "vidtok": vidtok}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the runs there")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no run after so long"
    )
    options = parser.parse_args(argv)
    end, found, code = time.monotonic() + options.budget, [], 0
    for name in chosen(options.only, RUNS):
        try:
            for run, value, unit, note in RUNS[name]():
                found.append({"name": run, "value": value, "unit": unit, "note": note})
                print(json.dumps(found[-1]), flush=True)
                if options.json:
                    write(options.json, json.dumps(found, indent=1) + "\n")
                if time.monotonic() > end:
                    print("out of time", flush=True)
                    return code
        except Exception as error:
            code = 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return code


if __name__ == "__main__":
    sys.exit(main())
