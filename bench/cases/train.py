"""A training step of a middling tokenizer, loss, gradients and AdamW; and the loss of a generator with its gradient."""

from dataclasses import replace
from functools import partial

import torch
from peers import train as peers

import vft
from vft.codebook import codebook_cross_entropy, fsq_features
from vft.config import make_config, parse_config
from vft.train.loss import draw, flow_loss

from .case import Case, accurate, case, compiled, size

# registers kept of 64: their mean is that of nested dropout, half uniform and half powers of two
KEEP = (57, 24, 16, 4)
SIDE, FRAMES, REGISTERS = 16, 5, 64


class Step:
    """Four clips of latents 16 x 5 x 16 x 16; encoder 256 x 4, decoder 384 x 6, 64 registers, random weights."""

    def __init__(self, device: str, dtype: torch.dtype):
        raw = make_config(
            encoder_width=256, encoder_depth=4, decoder_width=384, decoder_depth=6, registers=REGISTERS, grid=SIDE
        )
        self.model = vft.Tokenizer(parse_config(raw)).train()
        with torch.no_grad():
            for name, p in self.model.decoder.named_parameters():
                # what training starts from zero
                if "modulation" in name or name.startswith("head"):
                    p.copy_(0.02 * torch.randn_like(p))
        self.model.to(device)
        self.device, self.dtype = device, dtype
        self.latents = torch.randn(len(KEEP), 16, FRAMES, SIDE, SIDE, device=device)
        choices = draw(self.latents, REGISTERS, torch.Generator().manual_seed(0), null_probability=0.0)
        self.choices = replace(choices, keep=list(KEEP))
        self.dense = peers.masks(FRAMES, (SIDE // 2) ** 2, REGISTERS, device)
        # at rate 0 the weights stay, so that every turn computes the same
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def ours(self) -> torch.Tensor:
        return flow_loss(self.model, list(self.latents), self.choices)

    def plain(self) -> torch.Tensor:
        return peers.loss(self.model, self.latents, self.choices, self.dense)

    def gradients(self, loss) -> list[torch.Tensor]:
        self.backward(loss)
        gradients = [p.grad.clone() for p in self.model.parameters()]
        self.optimizer.zero_grad()
        return gradients

    def backward(self, loss) -> None:
        with torch.enable_grad():
            with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                value = loss()
            value.backward()

    def step(self, loss) -> None:
        self.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self) -> str | None:
        """The gradients of all parameters together: a bfloat16 code on an edge of FSQ may round either way."""
        got, want = (torch.cat([g.flatten() for g in self.gradients(loss)]) for loss in (self.ours, self.plain))
        error, limit = float((got - want).norm() / want.norm()), 1e-4 if self.dtype == torch.float32 else 0.1
        return None if error <= limit else f"relative error of the gradients {error:.1e} over {limit:.0e}"

    def flops(self) -> int:
        """Products of the blocks, attention left out, forward and backward."""
        patches, config = (SIDE // 2) ** 2, self.model.config
        tokens = {
            config.encoder: len(KEEP) * FRAMES * (patches + REGISTERS),
            config.decoder: sum(FRAMES * (patches + k + 1) for k in KEEP),
        }
        return sum(
            3 * 2 * n * trunk.depth * (4 * trunk.width**2 + 3 * trunk.width * trunk.mlp_width)
            for trunk, n in tokens.items()
        )


def train_step(dtype: torch.dtype, device: str) -> Case:
    it = Step(device, dtype)
    note = f"{len(KEEP)} clips, encoder 256 x 4, decoder 384 x 6, keep {', '.join(map(str, KEEP))} of {REGISTERS}"
    # weights, gradients and two moments, read and written
    moved = 8 * size(*it.model.parameters())
    peers = {"dense-mask SDPA": partial(it.step, it.plain)}
    ours = partial(it.step, it.ours)
    # made in eager steps by whoever trains
    return Case(dtype, list(it.latents.shape), ours, peers, it.check, moved, it.flops(), note, captures=False)


def cross_entropy(dtype: torch.dtype, device: str) -> Case:
    """The embedded generator's: 16 clips of 80 ids, 64,000 rows of features."""
    features = fsq_features((8, 8, 8, 5, 5, 5)).to(device)
    h = torch.randn(16 * 80, features.shape[1], device=device).to(dtype).requires_grad_()
    ids, table = torch.randint(len(features), (len(h),), device=device), features.to(dtype)

    def with_gradient(loss, h=h, table=table):
        with torch.enable_grad():
            return torch.autograd.grad(loss(h, table, ids), h)[0]

    def ours(h, table, ids):
        return codebook_cross_entropy(h, table, ids).mean()

    def check():
        wide = h.detach().double().requires_grad_()
        exact = with_gradient(lambda h, f, ids: torch.nn.functional.cross_entropy(h @ f.T, ids), wide, table.double())
        return accurate(with_gradient(ours), with_gradient(peers.cross_entropy), exact)

    losses = {"eager formula": peers.cross_entropy, **compiled(peers.cross_entropy, device)}
    contenders = {name: partial(with_gradient, loss) for name, loss in losses.items()}
    # logits, and their product with the table
    flops = 2 * 2 * len(h) * features.numel()
    note = f"{len(features):,} ids, loss and gradient"
    return Case(dtype, list(h.shape), partial(with_gradient, ours), contenders, check, 2 * size(h, table), flops, note)


for short, data_type in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    case(f"train_step_{short}")(partial(train_step, data_type))
    case(f"codebook_cross_entropy_{short}")(partial(cross_entropy, data_type))
