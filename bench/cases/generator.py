"""One token of the generator, depth 10 (on GPUs 16) and vocabulary 64,000, against the plain PyTorch loop on the same
weights."""

import contextlib
import os
from dataclasses import fields

import torch
from peers import generator as generator_peers

from flexkernels import BlockWeights, StackWeights, transformer_step_, transformer_step_ref_
from vft import Generator, decoding
from vft.config import parse_generator_config

from .case import Case, accurate, case, size

VOCAB, LENGTH, MAX_LEN, GUIDANCE = 64000, 512, 640, 2.0


def random_generator(device: str, dtype: torch.dtype, depth: int) -> Generator:
    raw = {"depth": depth, "vocab": VOCAB, "seq_len": MAX_LEN, "cond": "class", "n_classes": 600}
    with torch.device(device):
        return Generator(parse_generator_config(raw)).to(dtype).eval().requires_grad_(False)


@contextlib.contextmanager
def blocks_in(one_kernel: bool):
    """Steps and captures inside of this take one kernel for all blocks, or one for each part."""
    before = os.environ.get("FLEXKERNELS_PERSISTENT_STEP")
    os.environ["FLEXKERNELS_PERSISTENT_STEP"] = str(int(one_kernel))
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLEXKERNELS_PERSISTENT_STEP"]
        else:
            os.environ["FLEXKERNELS_PERSISTENT_STEP"] = before


class Ours:
    """The step over and over at one cache length, from the same token."""

    def __init__(self, model: Generator, samples: int, cuda_graph: bool, one_kernel: bool):
        self.one_kernel = one_kernel
        request = decoding.Request.checked(
            model.config, [0] * samples, frames=5, tokens_per_frame=MAX_LEN // 5, prompt=None, guided=True
        )
        self.model, self.samples = model, samples
        self.state = decoding.State(model, request, samples, decoding.Sampling(temperature=0.0, guidance=GUIDANCE))
        self.rewind(LENGTH)
        self.step = decoding.Graphs(model, self.state).step if cuda_graph else self.plain

    def plain(self, samples: int, limit: int):
        with blocks_in(self.one_kernel):
            self.model.step(self.state, samples, limit)

    def rewind(self, position: int):
        self.state.position.fill_(position)
        self.state.length.fill_(position)
        self.state.ids.fill_(1)

    @torch.no_grad()
    def __call__(self, step=None):
        self.rewind(LENGTH)
        with blocks_in(self.one_kernel):
            (step or self.step)(self.samples, MAX_LEN)
        return self.state.out[:, LENGTH]

    def once(self):
        """The step without a graph of its own, to be captured in another one."""
        return self(self.plain)


def generator_step(device: str, dtype: torch.dtype, samples: int, one_kernel: bool = False, depth: int = 0) -> Case:
    depth = depth or (16 if device == "cuda" else 10)
    model = random_generator(device, dtype, depth)
    rows = 2 * samples
    ours = Ours(model, samples, device == "cuda", one_kernel)
    loop = generator_peers.Loop(model.published(), depth, rows, MAX_LEN)
    # both caches hold the same: rows of ours are [cond, uncond] of each sample, of the loop all cond, then all uncond
    filled = 0.5 * torch.randn(2, depth, 2, samples, depth, MAX_LEN, 64, device=device)
    loop.cache.copy_(filled.flatten(2, 3))
    ours.state.k.copy_(filled[0].transpose(1, 2).flatten(1, 2))
    ours.state.v.copy_(filled[1].transpose(1, 2).flatten(1, 2))
    ids = torch.ones(samples, dtype=torch.int64, device=device)
    weights = [
        p for name, p in model.named_parameters() if not name.startswith(("tok_emb", "cls_emb", "pos_emb", "sos"))
    ]
    cached = 2 * depth * rows * depth * (LENGTH + 1) * 64 * filled.to(dtype).element_size()

    def peer():
        return loop.step(ids, LENGTH, GUIDANCE)

    @torch.no_grad()
    def check():
        seen = []
        hook = model.head.register_forward_hook(lambda module, args, out: seen.append(out))
        ours.rewind(LENGTH)
        ours.plain(samples, MAX_LEN)
        hook.remove()
        exact = generator_peers.Loop({k: v.double() for k, v in loop.w.items()}, depth, rows, MAX_LEN)
        exact.cache.copy_(loop.cache)
        # float64 and the loop's own, in our order of rows
        want, plain = (
            each.logits(ids.repeat(2), LENGTH).unflatten(0, (2, samples)).transpose(0, 1).flatten(0, 1)
            for each in (exact, loop)
        )
        wrong = accurate(seen[0], plain, want)
        same = dtype != torch.float32 or torch.equal(ours.state.out[:, LENGTH], peer())
        return wrong or (None if same else "ids differ")

    read = size(*weights) + cached
    return Case(
        dtype, [rows, LENGTH + 1], ours, {"plain loop": peer}, check, read,
        note=f"depth {depth}, vocabulary {VOCAB}; one token of {samples} guided samples; bytes are weights and cache",
        bandwidth="read", in_graph=ours.once,
    )  # fmt: skip


@case("generator_step_fp32")
def generator_step_fp32(device: str) -> Case:
    return generator_step(device, torch.float32, 1)


@case("generator_step_bf16")
def generator_step_bf16(device: str) -> Case:
    return generator_step(device, torch.bfloat16, 1)


@case("generator_step_batch8_fp32")
def generator_step_batch8_fp32(device: str) -> Case:
    return generator_step(device, torch.float32, 8)


@case("generator_step_batch8_bf16")
def generator_step_batch8_bf16(device: str) -> Case:
    return generator_step(device, torch.bfloat16, 8)


@case("generator_step_one_kernel_bf16", gpu_only=True)
def generator_step_one_kernel_bf16(device: str) -> Case:
    return generator_step(device, torch.bfloat16, 1, one_kernel=True)


@case("generator_step_one_kernel_batch4_bf16", gpu_only=True)
def generator_step_one_kernel_batch4_bf16(device: str) -> Case:
    return generator_step(device, torch.bfloat16, 4, one_kernel=True)


# width 1,536
@case("generator_step_depth24_bf16", gpu_only=True)
def generator_step_depth24_bf16(device: str) -> Case:
    return generator_step(device, torch.bfloat16, 1, depth=24)


@case("generator_step_one_kernel_depth24_bf16", gpu_only=True)
def generator_step_one_kernel_depth24_bf16(device: str) -> Case:
    return generator_step(device, torch.bfloat16, 1, one_kernel=True, depth=24)


@case("transformer_step_bf16", gpu_only=True)
def transformer_step_bf16(device: str) -> Case:
    """The blocks of a step alone, without embedding, head and draw; by default one kernel."""
    depth, rows = 16, 2
    model = random_generator(device, torch.bfloat16, depth)
    blocks, stack = [block.weights() for block in model.blocks], model.stack()
    k, v = 0.5 * torch.randn(2, depth, rows, depth, MAX_LEN, 64, device=device).bfloat16()
    length = torch.full((rows,), LENGTH + 1, dtype=torch.int32, device=device)
    start = torch.randn(rows, model.config.width, device=device).bfloat16()
    x = start.clone()

    @torch.no_grad()
    def ours(persistent=None):
        x.copy_(start)
        transformer_step_(x, stack, k, v, length, persistent=persistent)
        return x

    def double(block):
        given = {f.name: getattr(block, f.name) for f in fields(block)}
        return BlockWeights(**{name: None if t is None else t.detach().double() for name, t in given.items()})

    @torch.no_grad()
    def check():
        exact, plain = start.double(), start.clone()
        transformer_step_ref_(exact, StackWeights([double(b) for b in blocks]), k.double(), v.double(), length)
        transformer_step_ref_(plain, stack, k.clone(), v.clone(), length)
        return accurate(ours(), plain, exact)

    read = size(*stack.weights) + 2 * depth * rows * depth * (LENGTH + 1) * 64 * k.element_size()
    return Case(
        torch.bfloat16, [rows, LENGTH + 1], ours, {"a kernel for each op": lambda: ours(False)}, check, read,
        note=f"depth {depth}; blocks alone, one token of 1 guided sample; bytes are weights and cache",
        bandwidth="read",
    )  # fmt: skip
