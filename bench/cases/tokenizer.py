"""The tokenizer: a guided velocity of a middling decoder, ten guided steps, and one block of the released decoder."""

from functools import partial

import torch
from peers import flow as flow_peers
from peers import tokenizer as tokenizer_peers

import flexkernels
import vft
from vft.config import make_config, parse_config
from vft.packing import Member

from .case import Case, case, size

STEPS, TIME = 10, 0.6
GUIDANCE = vft.APG(25.0, 0.6)


class Middling:
    """Width 384, depth 6, 64 registers, latents 16 x 5 x 16 x 16, random weights; each way to its guided velocity."""

    def __init__(self, device: str, dtype: torch.dtype, width=384, depth=6, registers=64, side=16, keep=8):
        raw = make_config(
            encoder_width=64, encoder_depth=1, decoder_width=width, decoder_depth=depth, registers=registers, grid=side
        )
        self.model = vft.Tokenizer(parse_config(raw)).eval().requires_grad_(False)
        for name, p in self.model.decoder.named_parameters():
            # what training starts from zero
            if "modulation" in name or name.startswith("head"):
                p.copy_(0.02 * torch.randn_like(p))
        self.model.to(device, dtype).prepare()
        self.noise = torch.randn(16, 5, side, side, device=device)
        self.ids = torch.randint(64000, (5, registers), device=device)
        self.codes = flexkernels.fsq_dequantize(self.ids.flatten(), self.model.config.levels, dtype=dtype)
        self.time = torch.full((1,), TIME, device=device)
        self.plain = tokenizer_peers.Decoder(self.model.decoder, (5, side // 2, side // 2), device)
        self.dtype, self.keep = dtype, keep

    def velocity(self, collapse=True, packed=True):
        decoder, x = self.model.decoder, [self.noise.to(self.dtype)]
        members = (Member(0, self.keep), Member(0, self.keep, null=True))
        calls = [members] if packed else [members[:1], members[1:]]
        out = []
        for call in calls:
            made = decoder.packing(x, call, collapse)
            registers = decoder.embed_registers(self.codes, made)
            out += decoder.velocity(x, registers, decoder.modulation(self.time), made)
        return out

    def published(self, decoder=None):
        decoder = decoder or self.plain
        return [decoder(self.noise, self.time, self.codes, self.keep, null) for null in (False, True)]

    def sample(self):
        return self.model.decode_latents([self.ids], self.keep, STEPS, GUIDANCE, noise=[self.noise])[0]

    def sample_published(self, decoder=None):
        def update(x, cond, uncond, dt):
            cond, uncond = (v.float()[None] for v in (cond, uncond))
            return flow_peers.apg_step(x[None], cond, uncond, dt, GUIDANCE.scale, GUIDANCE.threshold, GUIDANCE.eta)[0]

        run = decoder or self.plain
        return tokenizer_peers.sample(run, self.noise, self.codes, self.keep, STEPS, GUIDANCE, update)

    def bytes(self) -> int:
        return size(*self.model.decoder.parameters())


def close(got, want, dtype: torch.dtype, limit: float) -> str | None:
    error = max(float((g.double() - w.double()).norm() / w.double().norm()) for g, w in zip(got, want, strict=True))
    limit = limit if dtype == torch.float32 else 0.02
    return None if error <= limit else f"relative error {error:.1e} over {limit:.0e}"


def flops_of(model, tokens: int) -> int:
    """Products of the blocks for so many tokens, attention left out."""
    trunk = model.config.decoder
    return 2 * tokens * trunk.depth * (4 * trunk.width**2 + 3 * trunk.width * trunk.mlp_width)


def decoder_velocity(dtype: torch.dtype, device: str) -> Case:
    it = Middling(device, dtype)
    compiled = torch.compile(it.plain)
    peers = {
        "two passes, not collapsed": partial(it.velocity, collapse=False, packed=False),
        "dense-mask SDPA": it.published,
        "torch.compile": partial(it.published, compiled),
    }
    check = lambda: close(it.velocity(), it.published(), dtype, 1e-5)  # noqa: E731
    tokens = 5 * (64 + 9) + 5 * 65
    note = "conditional and unconditional, keep 8 of 64"
    return Case(dtype, [16, 5, 16, 16], it.velocity, peers, check, it.bytes(), flops_of(it.model, tokens), note)


def decoder_sampler(dtype: torch.dtype, device: str) -> Case:
    it = Middling(device, dtype)
    compiled = torch.compile(it.plain)
    peers = {"dense-mask SDPA": it.sample_published, "torch.compile": partial(it.sample_published, compiled)}
    check = lambda: close([it.sample()], [it.sample_published()], dtype, 1e-4)  # noqa: E731
    tokens = STEPS * (5 * (64 + 9) + 5 * 65)
    note = f"{STEPS} Euler steps with APG, keep 8 of 64"
    flops = flops_of(it.model, tokens)
    # the sampler makes its own graph of a step
    return Case(dtype, [16, 5, 16, 16], it.sample, peers, check, it.bytes(), flops, note, captures=False)


def decoder_block(dtype: torch.dtype, device: str) -> Case:
    """Width 1792, 28 heads, 5 frames of 256 patches and 256 registers, keep 32, with guidance."""
    it = Middling(device, dtype, width=1792, depth=1, registers=256, side=32, keep=32)
    check = lambda: close(it.velocity(), it.published(), dtype, 1e-5)  # noqa: E731
    tokens = 5 * (256 + 33) + 5 * 257
    note = "one block with embeddings and head, keep 32 of 256, conditional and unconditional"
    peers = {"dense-mask SDPA": it.published, "two passes, not collapsed": partial(it.velocity, False, False)}
    return Case(dtype, [16, 5, 32, 32], it.velocity, peers, check, it.bytes(), flops_of(it.model, tokens), note)


for short, data_type in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    case(f"tokenizer_velocity_{short}")(partial(decoder_velocity, data_type))
    case(f"tokenizer_sampler_{short}")(partial(decoder_sampler, data_type))
case("tokenizer_block_bf16")(partial(decoder_block, torch.bfloat16))
