"""Two blocks in front of a decoder that hear what new registers say, solved for instead of learned.

A patch that attends to the registers of its place receives their mean, in which one register's codes cannot be told
from another's. So registers first put their codes into channels of their group: a gated MLP, whose gates know group
and kind of frame (a first one or a later one) by the register's position. The attention of the second block brings
these to the patches of the place, and what it adds there moves the velocity, through the decoder's head, towards what
the codes say. Its MLP hides the new registers from the blocks behind it, to which they would be strange: one large
vector, the same for all, is added to each. So the rest of the decoder goes on nearly as it was, and learns to use what
is there.
"""

from __future__ import annotations

import copy
from functools import partial

import torch

from ..config import parse_config
from ..layers import Member, patchify
from ..tokenizer import Tokenizer
from . import initial
from .start import entry, modules

BLOCKS = 2
# what opens a gate, and how loud the channels of a group are beside a register's other channels
OPEN, LOUD = 12.0, 4.0
# norm of the vector that hides a register, beside the mean of theirs
HIDDEN = 20.0
# tried for what the attention adds, times what the head alone would ask for
GAINS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
# of the least squares, relative to the mean of the diagonal
RIDGE = 1e-4


def fits(model: Tokenizer, groups: int, rows: int, columns: int) -> bool:
    """Whether the blocks have room for ``groups`` of new registers, one a patch of rows x columns each."""
    if not initial.fits(model, rows, columns):
        return False
    trunk, values = model.config.decoder, groups * len(model.config.levels)
    free = trunk.width - initial.Codes(model.config.max_frames, rows, columns).count
    return values <= trunk.head_dim and 2 * values <= min(free, trunk.mlp_width)


def grown(model: Tokenizer) -> Tokenizer:
    """The same model with ``BLOCKS`` more blocks in front of its decoder's, which change nothing yet."""
    raw = copy.deepcopy(model.config.raw)
    entry(modules(raw), model.config, "decoder.blocks")["depth"] += BLOCKS
    more = Tokenizer(parse_config(raw), model.name)
    more.steps, more.guidance, more._codec_state = model.steps, model.guidance, model._codec_state
    weights, front = {}, "decoder.blocks."
    for name, value in model.state_dict().items():
        if name.startswith(front):
            number, rest = name.removeprefix(front).split(".", 1)
            name = f"{front}{int(number) + BLOCKS}.{rest}"
        weights[name] = value
    # the modulation of new blocks is 0, and so are their gates
    more.load_state_dict(more.state_dict() | weights)
    return more.train(model.training)


class _Pass:
    """One pass of the decoder from noise, with what some modules read: ``[B, T, N or P, width]`` of a module."""

    def __init__(self, model: Tokenizer, codes: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> None:
        decoder, (batch, frames, registers) = model.decoder, codes.shape[:3]
        members = tuple(Member(i, registers, 0, False) for i in range(batch))
        packed = decoder.packing(list(noise), members, False, None)
        where = torch.empty_like(packed.order)
        where[packed.order] = torch.arange(len(where), device=where.device)
        patches = where[: len(packed.patch_at)].view(batch, frames, -1)
        at = {True: where[len(packed.patch_at) :].view(batch, frames, registers), False: patches}
        first, second = decoder.blocks[:BLOCKS]
        self.read, handles = {}, []
        for name, module, of_registers in (
            ("said", first.mlp, True), ("attention", second.attn, True), ("heard", second.attn.proj, False),
            ("hidden", second.mlp, True),
        ):  # fmt: skip

            def note(_, arguments, name=name, index=at[of_registers]):
                self.read[name] = arguments[0][index]

            handles.append(module.register_forward_pre_hook(note))
        try:
            time = torch.ones(1, device=noise.device)
            embedded = decoder.embed_registers(codes.flatten(0, 2), packed)
            self.norm = embedded.norm(dim=1).mean()
            velocity = decoder.velocity(list(noise), embedded, decoder.modulation(time), packed)
        finally:
            for handle in handles:
                handle.remove()
        # of the velocity, patch by patch: [B, T, P, D]
        missing = [n - x - v for n, x, v in zip(noise, latents, velocity, strict=True)]
        self.missing = patchify(missing, model.config.patch).view(*patches.shape, -1)


@torch.no_grad()
def solve(model: Tokenizer, known: int, places: int, codes: torch.Tensor, latents: torch.Tensor) -> None:
    """Gives the first blocks of a :func:`grown` model their weights.

    Args:
        known: registers that the decoder hears already.
        places: new registers of a group, one a patch.
        codes: of all registers, quantised, ``[B, T, N, levels]``.
        latents: that they are codes of, ``[B, C, T, H, W]``.
    """
    decoder, config, levels = model.decoder, model.config, codes.shape[3]
    first, second = decoder.blocks[:BLOCKS]
    width = config.decoder.width
    new = torch.arange(known, model.registers)
    group = (new - known) // places
    groups = int(group[-1]) + 1
    each = groups * levels
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    run = partial(_Pass, model, codes, latents, noise)
    # gates [2, 6 * width] of patches and of registers: attention, MLP, ...
    gates = [block.adaLN_modulation[1].bias.view(2, 6, width) for block in (first, second)]
    gates[0][1, 1], gates[1][0, 0], gates[1][1, 1] = 1, 1, 1
    second.mlp.fc2.weight.zero_()

    # registers: which group, whether a first frame, and 1; then their codes
    read = run().read["said"]
    kinds = read.new_zeros(*read.shape[:3], groups + 2)
    for i in range(groups):
        kinds[:, :, new[group == i], i] = 1
    kinds[:, 0, :, groups], kinds[..., groups + 1] = 1, 1
    kind = _least_squares(read.flatten(0, 2), kinds.flatten(0, 2))
    said = _least_squares(read[:, :, new].flatten(0, 2), codes[:, :, new].flatten(0, 2))
    is_first, always = kind[:, groups], kind[:, groups + 1]
    apart = initial.Codes(config.max_frames, *_grid(model, latents)).count
    channels = read.new_zeros(width, 2 * each)
    channels[apart:] = torch.linalg.qr(torch.randn(width - apart, 2 * each)).Q
    first.mlp.fc2.weight.zero_()
    for frame, is_frame in enumerate((is_first, always - is_first)):
        for i in range(groups):
            units = slice(frame * each + i * levels, frame * each + (i + 1) * levels)
            # +0.5 where both hold, -0.5 or less elsewhere
            first.mlp.fc1.weight[units] = OPEN * (kind[:, i] + is_frame - 1.5 * always)
            first.mlp.fc3.weight[units] = said.T
            first.mlp.fc2.weight[:, units] = LOUD / (0.5 * OPEN) * channels[:, units]

    # the attention reads them, first frames by one head and later ones by another, at a patch's own place
    read = run().read["attention"]
    wanted = read.new_zeros(*read.shape[:3], 2, groups, levels)
    for i in range(groups):
        members = new[group == i]
        wanted[:, 0, members, 0, i], wanted[:, 1:, members, 1, i] = codes[:, 0, members], codes[:, 1:, members]
    value = _least_squares(read.flatten(0, 2), wanted.flatten(3).flatten(0, 2))
    attention, dim = second.attn, second.attn.head_dim
    initial.aim(attention, initial.Codes(config.max_frames, *_grid(model, latents)), initial.FINE)
    attention.wv.weight.zero_(), attention.proj.weight.zero_()
    for head in range(2):
        rows = slice(head * dim, (head + 1) * dim)
        attention.wq.weight[rows], attention.wk.weight[rows] = attention.wq.weight[:dim], attention.wk.weight[:dim]
        attention.wv.weight[head * dim : head * dim + each] = value[:, head * each : (head + 1) * each].T

    # then one unit hides new registers
    before = run()
    read = before.read["hidden"]
    kinds = read.new_ones(*read.shape[:3], 2)
    kinds[:, :, :known, 0] = 0
    kind = _least_squares(read.flatten(0, 2), kinds.flatten(0, 2))
    strange = torch.randn(width - apart)
    strange = HIDDEN * before.norm * torch.nn.functional.normalize(strange - strange.mean(), dim=0)
    second.mlp.fc1.weight[0] = OPEN * (2 * kind[:, 0] - kind[:, 1])
    second.mlp.fc3.weight[0] = kind[:, 1]
    second.mlp.fc2.weight[apart:, 0] = strange.to(read) / OPEN

    # what was heard moves the patch so that the head adds what the velocity misses
    heard = [head * dim + i for head in range(2) for i in range(each)]
    before = run()
    adds = _least_squares(before.read["heard"][..., heard].flatten(0, 2), before.missing.flatten(0, 2))
    head = decoder.head.weight
    if decoder.head_modulation is not None:
        _, scale = decoder.modulation(torch.ones(1, device=head.device)).head[0].chunk(2)
        head = head * (1 + scale)
    move = torch.linalg.lstsq(head, adds.T).solution
    weight = model.codec.pixel_weight(latents.shape[2])
    weight = torch.ones_like(latents) if weight is None else weight.expand_as(latents)
    weight = patchify(weight.unbind(), config.patch).view(before.missing.shape)
    errors = {0.0: float((before.missing.square() * weight).mean())}
    for gain in GAINS:
        attention.proj.weight[:, heard] = gain * move
        errors[gain] = float((run().missing.square() * weight).mean())
    attention.proj.weight[:, heard] = min(errors, key=errors.get) * move


def _grid(model: Tokenizer, latents: torch.Tensor) -> tuple[int, int]:
    return tuple(n // p for n, p in zip(latents.shape[3:], model.config.patch[1:], strict=True))


def _least_squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The matrix ``[n, m]`` that makes most of y ``[rows, m]`` of x ``[rows, n]``, in float32."""
    x, y = x.double(), y.double()
    gram = x.T @ x
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), x.T @ y).float()
