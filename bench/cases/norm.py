"""Norms and SwiGLU at the size of one decoder block: 2,560 tokens of eight samples, width 1792."""

import torch
from peers import norm as peers

import flexkernels

from .case import Case, accurate, case, compiled, size

TOKENS, WIDTH, SAMPLES, HIDDEN = 2560, 1792, 8, 4778


def tuple_of(results):
    return results if isinstance(results, tuple) else (results,)


def arguments_of(name: str, dtype, device: str) -> list:
    """The tensors of one call; tables are views of one [samples, 6 * width] tensor, as modulation layers make them."""

    def rows(width=WIDTH):
        return torch.randn(TOKENS, width, device=device).to(dtype)

    if name == "swiglu":
        return [rows(2 * HIDDEN)]
    if name == "rms_norm":
        return [rows(), torch.randn(WIDTH, device=device).to(dtype), rows()]
    tables = (0.5 * torch.randn(SAMPLES, 6 * WIDTH, device=device)).to(dtype).chunk(6, -1)[:3]
    segment = torch.arange(SAMPLES, device=device, dtype=torch.int32).repeat_interleave(TOKENS // SAMPLES)
    if name == "adaln_norm":
        return [rows(), *tables[1:], segment]
    return [rows(), rows(), *(tables[:1] if name == "gated_residual" else tables), segment]


def ours_of(name: str):
    if name == "rms_norm":
        return lambda x, weight, residual: flexkernels.rms_norm(x, weight, residual=residual)
    return getattr(flexkernels, name)


def exact_of(name: str, tensors):
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    if name == "rms_norm":
        return tuple_of(flexkernels.rms_norm_ref(*wide[:2], residual=wide[2]))
    return tuple_of(getattr(flexkernels, f"{name}_ref")(*wide))


def first_wrong(results, plain, exact):
    return next((wrong for triple in zip(results, plain, exact, strict=True) if (wrong := accurate(*triple))), None)


def forward_case(name: str, dtype, device: str) -> Case:
    tensors, ours, eager = arguments_of(name, dtype, device), ours_of(name), getattr(peers, name)

    def check():
        return first_wrong(tuple_of(ours(*tensors)), tuple_of(eager(*tensors)), exact_of(name, tensors))

    contenders = {"eager formula": lambda: eager(*tensors)}
    contenders |= {key: lambda f=f: f(*tensors) for key, f in compiled(eager, device).items()}
    moved = size(*tensors, *tuple_of(ours(*tensors)))
    return Case(dtype, list(tensors[0].shape), lambda: ours(*tensors), contenders, check, moved)


def backward_case(name: str, dtype, device: str) -> Case:
    """The backward pass alone, over a graph that is kept."""
    tensors = arguments_of(name, dtype, device)

    def graph(function, given):
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in given]
        with torch.enable_grad():
            results = tuple_of(function(*leaves))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = [torch.linspace(-1, 1, r.numel(), device=device).view(r.shape).to(r.dtype) for r in results]
        return lambda: torch.autograd.grad(results, wanted, gradients, retain_graph=True)

    ours, eager = graph(ours_of(name), tensors), graph(getattr(peers, name), tensors)

    def check():
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        return first_wrong(ours(), eager(), graph(lambda *given: exact_of(name, given), wide)())

    contenders = {"eager formula": eager}
    contenders |= {key: graph(f, tensors) for key, f in compiled(getattr(peers, name), device).items()}
    moved = size(*tensors, *ours(), *tuple_of(ours_of(name)(*tensors)))
    return Case(dtype, list(tensors[0].shape), ours, contenders, check, moved, note="backward alone")


def add(name: str, dtype, suffix: str):
    case(f"{name}_{suffix}")(lambda device: forward_case(name, dtype, device))
    case(f"{name}_backward_{suffix}")(lambda device: backward_case(name, dtype, device))


for op in ("gated_residual_adaln_norm", "gated_residual", "adaln_norm", "rms_norm", "swiglu"):
    add(op, torch.bfloat16, "bf16")
for op in ("gated_residual_adaln_norm", "swiglu"):
    add(op, torch.float32, "fp32")
