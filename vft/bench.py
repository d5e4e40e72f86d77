"""``vft bench``: how long a call or a step of training takes with a model on this machine, and where the time goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import nn

from flexkernels.library import current_backend

from . import measure, profiling, states
from .codec import VIDTOK
from .config import make_config, parse_config
from .generation import DEFAULT_SIZE
from .tokenizer import Tokenizer
from .train.loop import Engine, Trainer
from .train.parallel import Group
from .train.tokenizer import TINY, TokenizerSettings, TokenizerTask
from .vidtok import VidTokCodec

CAPTION_TOKENS = 16
# encoder 1152 x 18, decoder 1792 x 28, 256 registers for 256 patches of each of 5 latent frames
PUBLISHED = {
    "encoder_width": 1152, "encoder_depth": 18, "decoder_width": 1792, "decoder_depth": 28, "registers": 256,
    "grid": 16, "size": 256,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is timed: ``call(graphs)``, with CUDA graphs where there are any; frames and tokens that one call makes;
    ``parts`` that a profile tells apart, see :func:`vft.profiling.labelled`."""

    title: str
    call: Callable[[bool], object]
    frames: int
    tokens: int
    device: torch.device
    parts: tuple[tuple[str, object, str], ...] = ()


def random_tokenizer(config: Path | None, device: torch.device, dtype: torch.dtype, seed: int) -> Tokenizer:
    """A tokenizer of random weights: of a config.json, or None for the published size, 2.47 B parameters and VidTok."""
    try:
        raw = make_config(**PUBLISHED) if config is None else json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} must be a config.json, got {error}") from error
    torch.manual_seed(seed)
    with device:
        model = Tokenizer(parse_config(raw), "random")
        if model.config.codec == VIDTOK:
            model.hold_codec(VidTokCodec().requires_grad_(False).eval())
    for name, p in model.decoder.named_parameters():
        # what training starts from zero
        if "modulation" in name or name.startswith("head"):
            nn.init.normal_(p, std=0.02)
    return model.to(device, dtype).eval().requires_grad_(False)


def encode_job(tokenizer, *, batch: int, frames: int, size: int | None, seed: int) -> Job:
    """Random frames to ids, ``batch`` chunks of ``frames`` latent frames in one call.

    Raises ValueError where the model does not take such chunks.
    """
    side, length = _side(tokenizer, size), _length(tokenizer, frames)
    generator = torch.Generator().manual_seed(seed)
    chunks = [2 * torch.rand(length, 3, side, side, generator=generator) - 1 for _ in range(batch)]
    title = f"encode with {tokenizer.name}: batch {batch}, {length} frames of {side}x{side}"
    tokens = batch * frames * tokenizer.registers
    parts = ("VAE", tokenizer.codec, "encode"), ("transformer", tokenizer.encoder, "forward")
    return Job(title, lambda graphs: tokenizer.encode_chunks(chunks), batch * length, tokens, tokenizer.device, parts)


def decode_job(tokenizer, *, batch: int, frames: int, keep: int | None, size: int | None, seed: int, **sampler) -> Job:
    """Random ids to frames, ``batch`` chunks in one packed call; ``sampler`` goes to ``tokenizer.decode_latents``.

    Raises ValueError where the model does not take such chunks.
    """
    side, length, keep = _side(tokenizer, size), _length(tokenizer, frames), keep or tokenizer.registers
    generator = torch.Generator().manual_seed(seed)
    shape = tokenizer.codec.latent_shape(length, side, side)
    noise = [torch.randn(shape, generator=generator).to(tokenizer.device) for _ in range(batch)]
    rows, largest = (frames, tokenizer.registers), tokenizer.config.codebook_size
    ids = [torch.randint(largest, rows, generator=generator).to(tokenizer.device) for _ in range(batch)]

    def call(graphs: bool) -> torch.Tensor:
        tokenizer.cuda_graphs = graphs
        latents = tokenizer.decode_latents(ids, keep, noise=noise, **sampler)
        return tokenizer.codec.decode(torch.stack(latents))

    steps = sampler.get("steps", tokenizer.steps)
    title = (
        f"decode with {tokenizer.name}: batch {batch}, {length} frames of {side}x{side}, keep {keep} of "
        f"{tokenizer.registers}, {steps} steps of {sampler['solver']}"
    )
    decoder = tokenizer.decoder
    parts = (
        ("VAE", tokenizer.codec, "decode"), ("sampler", states._State, "update"),
        *(("transformer", decoder, name) for name in ("velocity", "embed_registers", "modulation")),
    )  # fmt: skip
    return Job(title, call, batch * length, batch * frames * keep, tokenizer.device, parts)


def train_job(*, batch: int, device: torch.device, bf16: bool, seed: int) -> Job:
    """Steps of the training of a new tokenizer, each on clips that were not seen before."""
    settings = TokenizerSettings(batch=batch, seed=seed, bf16=bf16, clips=1 << 31, steps=1 << 31)
    torch.manual_seed(seed)
    task = TokenizerTask(settings, make_config(**TINY))
    trainer = Trainer(settings, task, Engine(str(device)), Group(device))
    steps = count()

    def call(graphs: bool) -> None:
        with torch.enable_grad():
            trainer.step(next(steps))

    length, size = task.model.config.chunk_size, task.model.size
    title = f"train a new tokenizer: batch {batch}, {length} frames of {size}x{size}"
    optimizers = dict.fromkeys(trainer.optimizer_of.values())
    parts = (
        ("clips and codec", task.data, "batch"), ("forward", trainer, "loss"), ("optimizer", trainer, "_average"),
        *(("optimizer", each, "step") for each in optimizers),
    )  # fmt: skip
    tokens = batch * task.codec.latent_shape(length, size, size)[1] * task.model.registers
    return Job(title, call, batch * length, tokens, device, parts)


def generate_job(model, *, batch: int, frames: int, keep: int | None, **options) -> Job:
    """Ids of ``batch`` samples; ``options`` go to ``model.generate``.

    Raises ValueError where they do not fit the model.
    """
    keep = keep or max(1, model.config.seq_len // frames)
    condition = {"class_id": [0] * batch}
    if model.config.cond == "text":
        condition = {"text_emb": torch.randn(batch, CAPTION_TOKENS, model.config.ctx_dim)}

    def call(graphs: bool) -> torch.Tensor:
        cuda_graph = None if graphs else False
        return model.generate(**condition, frames=frames, tokens_per_frame=keep, cuda_graph=cuda_graph, **options)

    guidance = options.get("guidance")
    title = (
        f"generate with {model.name}: batch {batch}, {frames} latent frames, {keep} tokens each, guidance {guidance}"
    )
    return Job(title, call, 0, batch * frames * keep, model.device)


def _side(tokenizer, size: int | None) -> int:
    if tokenizer.size and size not in (None, tokenizer.size):
        raise ValueError(f"size must be {tokenizer.size}, where {tokenizer.name} works, got {size}")
    return tokenizer.size or size or DEFAULT_SIZE


def _length(tokenizer, frames: int) -> int:
    if frames > tokenizer.config.max_frames:
        raise ValueError(f"frames must be at most {tokenizer.config.max_frames}, got {frames}")
    return 1 + (frames - 1) * tokenizer.codec.temporal_stride


@torch.no_grad()
def run(job: Job, dtype: str, seconds: float, profile: bool = False, trace: Path | None = None, top: int = 15) -> None:
    """Prints milliseconds a call, frames and tokens a second, and with ``profile`` a table of ops.

    While it profiles, CUDA graphs are off, so that every kernel belongs to an op. ``trace`` is a Chrome trace to write.
    """
    kind = job.device.type
    print(f"{job.title}; {dtype} on {job.device}, {torch.get_num_threads()} CPU threads, backend {current_backend()}")
    timing = measure.alternate({"call": lambda: job.call(True)}, kind, seconds)["call"]
    rates = [f"{1000 * job.tokens / timing.ms:,.0f} tokens/s"]
    if job.frames:
        rates.insert(0, f"{1000 * job.frames / timing.ms:,.1f} frames/s")
    print(f"{timing.ms:.2f} ms a call (quartiles {timing.low:.2f} to {timing.high:.2f}), {', '.join(rates)}")
    if not profile:
        return
    ceiling = measure.ceilings(kind)
    with profiling.labelled(job.parts):
        found = profiling.profile(lambda: job.call(False), kind, ceiling, trace)
    if found.parts:
        print(f"\n{profiling.parts_table(found)}")
    print(f"\n{profiling.table(found, top)}")
    print(
        f"\nbound: copy {ceiling['copy_gb_s']:.0f} GB/s, products {ceiling['gemm_fp32_gflop_s']:,.0f} (float32) and "
        f"{ceiling['gemm_bf16_gflop_s']:,.0f} (bfloat16) GFLOP/s, measured now; -: not known from shapes"
    )
    if trace is not None:
        print(f"{trace}: Chrome trace of {profiling.CALLS} calls (chrome://tracing or ui.perfetto.dev)")
