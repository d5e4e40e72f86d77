"""Arguments of flow_step and flow_update for every guidance, dense and ragged, and their gradients."""

from dataclasses import replace

import pytest
import torch

from flexkernels import APG, CFG, Prefix

GUIDANCE = {
    "none": None,
    "cfg": CFG(3.0),
    "cfg_rescale": CFG(3.0, rescale=0.7),
    "apg": APG(25.0, threshold=0.6),
    "apg_eta": APG(5.0, threshold=0.0, eta=0.4),
    "apg_momentum": APG(5.0, threshold=2.0, eta=0.2, momentum=-0.5),
}
RAGGED = [0, 1, 18, 18, 147, 298, 1500]
every_guidance = pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)


def draw(guidance, shape, x_dtype=torch.float32, v_dtype=torch.float32, prefix=None, **settings):
    """Arguments of flow_step on the CPU, every tensor drawn in its own dtype; `prefix` is the shape of its values."""
    arguments = {"x": torch.randn(shape).to(x_dtype), "v_cond": torch.randn(shape).to(v_dtype)}
    if guidance is not None:
        # close to v_cond, as velocities are, so that some rows stay below the threshold
        scale = torch.rand(1) * 0.2
        arguments["v_uncond"] = (arguments["v_cond"].float() + scale * torch.randn(shape)).to(v_dtype)
    if isinstance(guidance, APG) and guidance.momentum:
        arguments["momentum_buffer"] = 0.1 * torch.randn(shape)
    if prefix is not None:
        arguments["prefix"] = Prefix(torch.randn(prefix), noise=torch.randn(prefix), time=0.3)
    return arguments | {"dt": -0.05, "guidance": guidance} | settings


def draw_ragged(guidance, **settings):
    arguments = draw(guidance, RAGGED[-1], prefix=158, row_offsets=torch.tensor(RAGGED), **settings)
    starts = torch.tensor([0, 1, 6, 6, 6, 157, 158])
    return arguments | {"prefix": replace(arguments["prefix"], offsets=starts)}


def tensors_of(arguments):
    """Every tensor by name; those of a list and of a Prefix as `past.1` and `prefix.noise`."""
    found = {}
    for name, value in arguments.items():
        parts = {name: value}
        if isinstance(value, (list, tuple)):
            parts = {f"{name}.{i}": part for i, part in enumerate(value)}
        elif isinstance(value, Prefix):
            parts = {f"{name}.{part}": getattr(value, part) for part in ("values", "offsets", "noise")}
        found |= {part: tensor for part, tensor in parts.items() if isinstance(tensor, torch.Tensor)}
    return found


def with_tensors(arguments, tensors):
    """The arguments with other tensors, named as `tensors_of` does."""
    changed = dict(arguments)
    for name, tensor in tensors.items():
        name, _, part = name.partition(".")
        value = changed[name]
        if isinstance(value, Prefix):
            changed[name] = replace(value, **{part: tensor})
        else:
            changed[name] = [tensor if i == int(part) else v for i, v in enumerate(value)] if part else tensor
    return changed


def convert(arguments, device=None, double=False, grad=False):
    def change(value):
        value = value.detach().to(device or value.device, copy=True)
        if not value.is_floating_point():
            return value
        return (value.double() if double else value).requires_grad_(grad)

    return with_tensors(arguments, {name: change(value) for name, value in tensors_of(arguments).items()})


def gradients(function, arguments):
    leaves = convert(arguments, grad=True)
    results = [result for result in function(**leaves) if result is not None]
    weights = [torch.linspace(-1, 1, r.numel(), device=r.device, dtype=torch.float64).view(r.shape) for r in results]
    sum((r.double() * w).sum() for r, w in zip(results, weights, strict=True)).backward()
    return {name: leaf.grad for name, leaf in tensors_of(leaves).items() if leaf.requires_grad}
