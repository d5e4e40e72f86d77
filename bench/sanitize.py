"""Every op of the CUDA C++ backend once at small, odd sizes, forward and backward: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python bench/sanitize.py [--backend cuda]

Results are compared with each op's reference, so that a run without a report of the tool still says something.
"""

import argparse
import sys

import torch

import flexkernels
from flexkernels import APG, CFG, norm, norm_math, solvers

LEVELS = (8, 8, 8, 5, 5, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).to(dtype)


def fsq(device, dtype):
    z = 2 * rows(131, 6, dtype=dtype, device=device)
    codes, ids = flexkernels.fsq_quantize(z, LEVELS)
    want = flexkernels.fsq_quantize_ref(z.cpu(), LEVELS)
    yield "fsq_quantize", (codes, ids), want
    yield "fsq_dequantize", flexkernels.fsq_dequantize(ids, LEVELS, dtype=dtype), codes
    weight, bias = rows(72, 6, dtype=dtype, device=device), rows(72, dtype=dtype, device=device)
    given = (ids, LEVELS, weight, bias)
    yield "fsq_embed", flexkernels.fsq_embed(*given), flexkernels.fsq_embed_ref(*given)
    hidden, weight = rows(37, 72, dtype=dtype, device=device), rows(6, 72, dtype=dtype, device=device)
    given = (hidden, weight, None, LEVELS)
    # ids may fall either way near a threshold, so only their range is compared
    found = flexkernels.fsq_project_quantize(*given)
    yield "fsq_project_quantize", found.clamp(0, 63_999), found


def flow(device, dtype):
    x, v, u = rows(3, 3, 5, 7, 9, dtype=dtype, device=device)
    for guidance in (None, CFG(3.0), CFG(3.0, 0.7), APG(25.0, 0.6), APG(25.0, 0.6, 0.1, -0.5)):
        settings = {"dt": -0.1, "guidance": guidance}
        if guidance is None:
            yield "flow_step", flexkernels.flow_step(x, v, **settings), flexkernels.flow_step_ref(x, v, **settings)
            continue
        if isinstance(guidance, APG) and guidance.momentum:
            settings["momentum_buffer"] = rows(*x.shape, device=device)
        yield "flow_step", flexkernels.flow_step(x, v, u, **settings), flexkernels.flow_step_ref(x, v, u, **settings)
    yield (
        "flow_update",
        flexkernels.flow_update([x], [1.0], v, b=-0.1),
        flexkernels.flow_update_ref([x], [1.0], v, b=-0.1),
    )
    # numbers on the device come with states in float32
    state, given = x.float(), {"past": [x.float()], "past_b": [0.5], "guidance": CFG(3.0)}
    scalars = torch.tensor(solvers.scalars([1.0], -0.1, [0.5], 3.0), device=device)
    yield (
        "flow_update with scalars",
        flexkernels.flow_update([state], [1.0], v, u, b=-0.1, scalars=scalars, **given),
        flexkernels.flow_update_ref([state], [1.0], v, u, b=-0.1, **given),
    )


def norms(device, dtype):
    x, y = rows(2, 33, 136, dtype=dtype, device=device)
    gate, shift, scale = rows(3, 2, 136, dtype=dtype, device=device)
    segment = torch.arange(33, dtype=torch.int32, device=device) % 2
    calls = {
        "gated_residual_adaln_norm": (x, y, gate, shift, scale, segment),
        "gated_residual": (x, y, gate, segment),
        "adaln_norm": (x, shift, scale, segment),
        "rms_norm": (x, gate[0]),
        "swiglu": (x,),
    }
    for name, given in calls.items():
        results = [gradients(getattr(flexkernels, f"{name}{ending}"), given) for ending in ("", "_ref")]
        yield f"{name} and its gradients", *results
    # the CUDA kernel finds the order of the segments itself, as it has to in a capture
    order = (None, None) if device == "cuda" else norm_math.given_order(segment, None, None, 2)
    wanted = norm_math.GRAD_Y | norm_math.GRAD_GATE | norm_math.GRAD_SHIFT | norm_math.GRAD_SCALE
    given = (y, x, x, y, gate, scale, segment, *order, 2, 1e-5, False, wanted)
    with torch.no_grad():
        yield "norm_backward without an order", norm._norm_backward_op(*given), norm_math.norm_backward(*given)


def gradients(function, given):
    leaves = [g.detach().clone().requires_grad_() if g.is_floating_point() else g for g in given]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return (*outs, *torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs]))


@torch.no_grad()
def decoding(device, dtype):
    heads, dim, longest = 4, 64, 37
    lengths = torch.tensor([1, 19], dtype=torch.int32, device=device)
    caches = rows(2, 2, 2, longest, dim, dtype=dtype, device=device)
    q = rows(2, 1, heads, dim, dtype=dtype, device=device)
    given = (q, *caches, lengths)
    yield "decode_attention", flexkernels.decode_attention(*given), flexkernels.decode_attention_ref(*given)
    given = (rows(2, 3, heads, dim, dtype=dtype, device=device), *caches, lengths + 2)
    yield "decode_attention, 3 tokens", flexkernels.decode_attention(*given), flexkernels.decode_attention_ref(*given)
    qkv = rows(2, 1, 3 * 2 * dim, dtype=dtype, device=device)
    mine, plain = caches.clone(), caches.clone()
    out = flexkernels.kv_append_(qkv, *mine, lengths, heads=2, norm="rms")
    want = flexkernels.kv_append_ref_(qkv, *plain, lengths, heads=2, norm="rms")
    yield "kv_append_", (out, mine), (want, plain)
    yield "qk_norm", flexkernels.qk_norm(qkv[:, 0], 2), flexkernels.qk_norm_ref(qkv[:, 0], 2)
    for count in (1, 3, 16):
        given = rows(count, 72, dtype=dtype, device=device), rows(48, 72, dtype=dtype, device=device)
        yield "skinny_linear", flexkernels.skinny_linear(*given), flexkernels.skinny_linear_ref(*given)
        norm = {"norm_weight": rows(72, dtype=dtype, device=device)}
        want = flexkernels.skinny_linear_ref(*given, **norm)
        yield "skinny_linear of normed rows", flexkernels.skinny_linear(*given, **norm), want
        weight, scale = flexkernels.quantize_rows(given[1])
        settings = {"weight_scale": scale, "activation": "swiglu"}
        yield (
            "skinny_linear int8",
            flexkernels.skinny_linear(given[0], weight, **settings),
            flexkernels.skinny_linear_ref(given[0], weight, **settings),
        )
    logits = 3 * rows(3, 1031, device=device)
    settings = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 1}
    want = flexkernels.sample_logits_ref(logits.cpu(), **settings)
    yield "sample_logits", flexkernels.sample_logits(logits, **settings), want


def calls(family, device, dtype):
    """The calls of a family, up to the first that raises, which is one too: (name, found, wanted)."""
    try:
        yield from family(device, dtype)
    except Exception as error:
        yield f"{family.__name__} raised {type(error).__name__}: {error}", None, None


def close(found, want, dtype) -> bool:
    if found is None:
        return False
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, want)), strict=True)
    # float32 sums of low-precision terms; a wrong kernel is off by far more
    limit = 1e-4 if dtype == torch.float32 else 0.1
    return all(
        (a is None and b is None) or torch.allclose(a.cpu().double(), b.cpu().double(), rtol=limit, atol=limit)
        for a, b in pairs
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda")
    name = parser.parse_args(argv).backend
    torch.manual_seed(0)
    wrong, count = [], 0
    for dtype in DTYPES:
        for family in (fsq, flow, norms, decoding):
            with flexkernels.backend(name):
                for op, found, want in calls(family, name, dtype):
                    count += 1
                    wrong += [] if close(found, want, dtype) else [f"{op} {dtype}"]
    print(f"{count} calls of the {name} backend, {len(wrong)} wrong" + "".join(f"\n{each}" for each in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
