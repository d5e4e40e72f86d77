"""A call of every op for test_derivatives.py: its differentiable tensors, the op as a function of them, and its
specification. A new op needs an entry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from flow_cases import GUIDANCE, draw, draw_ragged, tensors_of, with_tensors

import flexkernels
from flexkernels import CFG, fsq_math, library

OPS = library.OPS


@dataclass(frozen=True)
class Example:
    """ours, ref: functions of `tensors` (float32; float64 for `ref`), which return a tensor or several.

    forward: whether it has a forward-mode derivative; otherwise NotImplementedError names the op.
    backward: whether it has a gradient; otherwise `error` is raised, which names the op.
    straight: the derivatives are not those of the results but of what they were rounded from; `ref` is that.
    linear: its second derivatives are 0.
    second: whether it has a second derivative in reverse mode; otherwise NotImplementedError names an op.
    """

    ours: Callable
    ref: Callable
    tensors: list[torch.Tensor] = field(repr=False)
    forward: bool = True
    backward: bool = True
    second: bool = False
    straight: bool = False
    linear: bool = False
    error: type[Exception] = NotImplementedError


def examples(name: str) -> list[Example]:
    torch.manual_seed(0)
    made = list(EXAMPLES[name]())
    # tensors of their own: PyTorch refuses tangents of views in some traces
    return [replace(e, tensors=[t.clone(memory_format=torch.contiguous_format) for t in e.tensors]) for e in made]


# norms: 5 rows of 12, whose modulation comes from 3 rows of the tables

SEGMENT = torch.tensor([0, 2, 2, 0, 2], dtype=torch.int32)
ORDER, OFFSETS = torch.tensor([0, 3, 1, 2, 4]), torch.tensor([0, 2, 2, 5])
EPS = 1e-3


def rows(count):
    return list(torch.randn(count, 5, 12))


def tables(count):
    return list(torch.randn(count, 3, 12))


def adaln_norm():
    calls = [lambda x, shift, scale, f=f: f(x, shift, scale, SEGMENT, eps=EPS) for f in both("adaln_norm")]
    yield Example(*calls, rows(1) + tables(2))
    yield Example(*both("adaln_norm"), rows(1))


def gated_residual_adaln_norm():
    name = "gated_residual_adaln_norm"
    calls = [lambda x, y, gate, shift, scale, f=f: f(x, y, gate, shift, scale, SEGMENT, eps=EPS) for f in both(name)]
    yield Example(*calls, rows(2) + tables(3))
    yield Example(*both(name), rows(2))


def gated_residual():
    calls = [lambda x, y, gate, f=f: f(x, y, gate, SEGMENT) for f in both("gated_residual")]
    yield Example(*calls, rows(2) + tables(1))


def rms_norm():
    calls = [lambda x, weight, residual, f=f: f(x, weight, residual=residual, eps=EPS) for f in both("rms_norm")]
    yield Example(*calls, [*rows(1), torch.randn(12), *rows(1)])
    yield Example(*both("rms_norm"), [*rows(1), torch.randn(12)])


def swiglu():
    yield Example(*both("swiglu"), rows(1))


def swiglu_backward():
    yield Example(*op_itself("swiglu_backward"), [torch.randn(5, 6), *rows(1)], backward=False)


def norm_backward():
    def arguments(grad_out, grad_sum, v, y, gate, scale):
        return grad_out, grad_sum, v, y, gate, scale, SEGMENT, ORDER, OFFSETS, 3, EPS, False, 1 + 2 + 4 + 8

    calls = [lambda *tensors, f=f: f(*arguments(*tensors)) for f in op_itself("norm_backward")]
    yield Example(*calls, rows(4) + tables(2), backward=False)


# flow


def flow_update():
    for guidance in GUIDANCE.values():
        yield flow_example("flow_step", draw(guidance, (1, 2, 4, 3), prefix=(1, 2, 1, 3)))
    arguments = draw_ragged(GUIDANCE["apg_momentum"])
    x, dt = arguments.pop("x"), arguments.pop("dt")
    others = {"x": (x, torch.randn(x.shape)), "a": [0.7, -0.3], "b": dt, "past": (torch.randn(x.shape),)}
    yield flow_example("flow_update", arguments | others | {"past_b": [0.4], "return_velocity": True})


def flow_update_():
    def ours(v_cond):
        return flexkernels.flow_update_([torch.ones(1, 2, 6)], [1.0], v_cond, b=0.5)[0]

    yield Example(ours, None, [torch.randn(1, 2, 6)], forward=False, backward=False, error=ValueError)


def flow_example(name, arguments):
    named = {n: t for n, t in tensors_of(arguments).items() if t.is_floating_point()}

    def call(function):
        return lambda *tensors: function(**with_tensors(arguments, dict(zip(named, tensors, strict=True))))

    guidance = arguments["guidance"]
    linear = guidance is None or (isinstance(guidance, CFG) and not guidance.rescale)
    return Example(*map(call, both(name)), list(named.values()), second=True, linear=linear)


# FSQ: codes and embeddings of 5 tokens

LEVELS = (5, 4, 3)
IDS = torch.tensor([0, 59, 7, 31, 2])
SMOOTH = functools.partial(fsq_math.smooth, levels=LEVELS)


def fsq_quantize():
    ours = lambda z: flexkernels.fsq_quantize(z, LEVELS)[0]  # noqa: E731
    yield Example(ours, SMOOTH, [torch.randn(5, 3)], straight=True, second=True)


def fsq_quantize_train():
    settings = dict(seed=1, drop_p=0.5, corrupt_p=0.5)
    z = torch.randn(5, 3)
    kept = flexkernels.fsq_quantize_train(z, LEVELS, **settings)[1] == flexkernels.fsq_quantize(z, LEVELS)[1]
    assert kept.any() and not kept.all()
    ours = lambda z: flexkernels.fsq_quantize_train(z, LEVELS, **settings)[0]  # noqa: E731
    # a token that was replaced has no slope
    yield Example(ours, lambda z: SMOOTH(z) * kept.unsqueeze(-1), [z], straight=True, second=True)


def fsq_project_quantize():
    def ours(hidden, weight, bias):
        return flexkernels.fsq_project_quantize(hidden, weight, bias, LEVELS, eps=EPS, return_codes=True)[1]

    def ref(hidden, weight, bias):
        return SMOOTH(F.linear(F.layer_norm(hidden, hidden.shape[1:], eps=EPS), weight, bias))

    yield Example(ours, ref, [*rows(1), torch.randn(3, 12), torch.randn(3)], straight=True, second=True)


def fsq_embed():
    index, token_index = torch.tensor([[1, 0, 1, 1, 0], [-1, 0, -1, 1, -1]], dtype=torch.int32)

    def call(function):
        return lambda weight, bias, positions, tokens: function(
            IDS, LEVELS, weight, bias, positions=positions, position_index=index, tokens=tokens, token_index=token_index
        )

    tensors = [torch.randn(shape) for shape in ((6, 3), (6,), (2, 6), (2, 6))]
    yield Example(*map(call, both("fsq_embed")), tensors, linear=True)


def fsq_embed_backward():
    calls = [lambda grad, f=f: f(grad, IDS, LEVELS, None, None, 5, 0) for f in op_itself("fsq_embed_backward")]
    yield Example(*calls, [torch.randn(5, 6)], backward=False, linear=True)


# attention: 2 frames of 3 tokens; caches of 2 sequences of 4 and 7 keys; heads of 4 on 2

LENGTHS = torch.tensor([4, 7], dtype=torch.int32)


def attention():
    layout = flexkernels.SequenceLayout([[(2, 1)] * 2], "frame_causal_prefix")
    calls = [lambda q, k, v, f=f: f(q, k, v, layout) for f in both("attention")]
    yield Example(*calls, list(torch.randn(3, 6, 2, 8)))


def attention_backward():
    layout = flexkernels.SequenceLayout([[(2, 1)] * 2], "frame_causal_prefix")
    q, k, v = torch.randn(3, 6, 2, 8)
    out, lse = flexkernels.attention_ref(q, k, v, layout, return_lse=True)
    given = layout.arguments[0], None, *layout.arguments[1:], None
    calls = [lambda *tensors, f=f: f(*tensors, *given) for f in op_itself("attention_backward")]
    tensors = [torch.randn(6, 2, 8), q, k, v, out, lse.T]
    yield Example(*calls, tensors, forward=False, backward=False)


def decode_attention():
    calls = [lambda q, k, v, f=f: f(q, k, v, LENGTHS, return_lse=True) for f in both("decode_attention")]
    yield Example(*calls, [torch.randn(2, 2, 4, 8), *torch.randn(2, 2, 2, 7, 8)], backward=False)


def kv_append_():
    def ours(qkv):
        k_cache, v_cache = torch.zeros(2, 2, 2, 7, 4)
        return flexkernels.kv_append_(qkv, k_cache, v_cache, LENGTHS, heads=2)

    yield Example(ours, None, [torch.randn(2, 1, 24)], forward=False, backward=False, error=ValueError)


def qk_norm():
    rope, positions = tuple(torch.randn(2, 3, 2)), torch.tensor([2, 0, 1, 2, 2], dtype=torch.int32)

    def call(function, norm):
        return lambda qkv, q_weight, k_weight: function(
            qkv, 2, 1, norm=norm, q_weight=q_weight, k_weight=k_weight, eps=EPS, rope=rope, positions=positions
        )

    for norm in ("layer", "rms"):
        calls = [call(function, norm) for function in both("qk_norm")]
        yield Example(*calls, [torch.randn(5, 16), *torch.randn(2, 4)])


def qk_norm_backward():
    calls = [
        lambda grad_q, grad_k, qk, q_weight, k_weight, f=f: f(
            grad_q, grad_k, qk, 1, q_weight, k_weight, EPS, None, None, None
        )
        for f in op_itself("qk_norm_backward")
    ]
    tensors = [torch.randn(5, 2, 4), torch.randn(5, 1, 4), torch.randn(5, 12), *torch.randn(2, 4)]
    yield Example(*calls, tensors, backward=False)


# what only inference calls


def skinny_linear():
    calls = [lambda x, w, bias, r, f=f: f(x, w, bias, residual=r, activation="swiglu") for f in both("skinny_linear")]
    tensors = [torch.randn(shape) for shape in ((2, 12), (8, 12), (8,), (2, 4))]
    yield Example(*calls, tensors, backward=False, error=RuntimeError)


def causal_conv():
    weight = flexkernels.prepare_conv(torch.randn(5, 6, 3, 3, 3) / 12, torch.randn(5))

    def call(function):
        return lambda x, residual, past: function(x, weight, residual=residual, past=past)

    tensors = [torch.randn(1, 2, 5, 6, 6), torch.randn(1, 2, 5, 6, 5), torch.randn(1, 2, 5, 6, 6)]
    yield Example(*map(call, both("causal_conv")), tensors, backward=False, linear=True, error=RuntimeError)


def norm_silu():
    tensors = [torch.randn(5, 12), *torch.randn(2, 12)]
    yield Example(*both("norm_silu"), tensors, backward=False, error=RuntimeError)


def sample_logits():
    def ours(logits):
        return flexkernels.sample_logits(logits, seed=1, return_logprob=True)[1]

    yield Example(ours, None, [torch.randn(2, 9)], forward=False, backward=False)


def transformer_step_():
    vector = torch.ones(8)
    linears = {"qkv": (24, 8), "proj": (8, 8), "w13": (8, 8), "w2": (8, 4)}
    linears = {name: torch.randn(shape) for name, shape in linears.items()}

    def ours(w2):
        block = flexkernels.BlockWeights(norm_attn=vector, norm_mlp=vector, **linears | {"w2": w2})
        x, caches = torch.ones(2, 8), torch.zeros(2, 1, 2, 2, 7, 4)
        flexkernels.transformer_step_(x, flexkernels.StackWeights([block]), *caches, LENGTHS)
        return x

    yield Example(ours, None, [linears["w2"]], forward=False, backward=False, error=RuntimeError)


def both(name: str) -> tuple[Callable, Callable]:
    return getattr(flexkernels, name), getattr(flexkernels, f"{name}_ref")


def op_itself(name: str) -> tuple[Callable, Callable]:
    return OPS[name], OPS[name].reference


# ops that take no tensor of floats
WITHOUT = {"fsq_dequantize", "fsq_tables"}
EXAMPLES = {
    function.__name__: function
    for function in (
        adaln_norm,
        attention,
        attention_backward,
        causal_conv,
        decode_attention,
        flow_update,
        flow_update_,
        fsq_embed,
        fsq_embed_backward,
        fsq_project_quantize,
        fsq_quantize,
        fsq_quantize_train,
        gated_residual,
        gated_residual_adaln_norm,
        kv_append_,
        norm_backward,
        norm_silu,
        qk_norm,
        qk_norm_backward,
        rms_norm,
        sample_logits,
        skinny_linear,
        swiglu,
        swiglu_backward,
        transformer_step_,
    )
}
