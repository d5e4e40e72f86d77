"""Causal convolutions over channels-last video for inference, and layer norm with SiLU, each with its reference.

    causal_conv   out[t, y, x] = bias + sum over taps of weight[tap] x[t - .., y + .., x + ..] (+ residual)
    norm_silu     silu(LN(x) * weight + bias), silu(y) = y / (1 + exp(-y))

`prepare_conv` lays the weights out once. Taps of 3 x 3 in space and of 3 in time are computed from transformed tiles
(Cook-Toom; arXiv 1509.09308): 36 products for 4 x 4 outputs in place of 144, 9 for 2 x 2 behind an upsampling, 6 for 4
frames in place of 12. Against sums of all taps the float32 error grows by a factor of about 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import checks, library
from .norm import too_wide

PANEL = 16
DIRECT, SPACE, UPSAMPLE, TIME = range(4)


@dataclass(frozen=True)
class ConvWeight:
    """What `prepare_conv` made of a convolution's weights.

    weight: float32 [panels, products, depth, 16]; bias: float32 [phases * outputs] or None; taps: (time, height,
    width); phases: frames that come out of each; kind: DIRECT, SPACE, UPSAMPLE or TIME.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    taps: tuple[int, int, int]
    time_stride: int
    stride: int
    phases: int
    outputs: int
    kind: int


def prepare_conv(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    time_stride: int = 1,
    stride: int = 1,
    phases: int = 1,
    upsample: bool = False,
) -> ConvWeight:
    """Lays out the weights of a convolution for `causal_conv`.

    weight: [phases * outputs, channels, time, height, width], floating. bias: [phases * outputs] or None.
    time_stride: only every so many frames come out. stride: the same in space; what is missing is zeros on the far
        side, while with stride 1 zeros on both sides keep the size.
    phases: p weights, one after the other, that give frames p t, p t + 1, ... from the frames up to t.
    upsample: every pixel is repeated 2 x 2 before; needs taps 3 x 3 in space.

    Raises TypeError or ValueError for a wrong dtype, shape or number.
    """
    checks.tensor("weight", weight, (*checks.FLOATS, torch.float64), 5)
    for name, value in (("time_stride", time_stride), ("stride", stride), ("phases", phases)):
        if value < 1:
            checks.reject(name, "be at least 1", value)
    rows, _, *taps = weight.shape
    if 0 in weight.shape or rows % phases:
        checks.reject("weight", f"have a positive multiple of {phases} outputs and no empty side", list(weight.shape))
    if time_stride > taps[0]:
        checks.reject("time_stride", f"be at most {taps[0]}, the taps in time", time_stride)
    if bias is not None:
        checks.shape("bias", bias, (rows,))
    square = taps[1:] == [3, 3] and stride == 1
    if upsample and not square:
        checks.reject("upsample", "come with taps 3 x 3 and stride 1 in space", f"{taps} and {stride}")
    kind = UPSAMPLE if upsample else SPACE if square else DIRECT
    if taps == [3, 1, 1] and time_stride == stride == 1:
        kind = TIME
    outputs = rows // phases
    panels = _panels(weight, kind, phases)
    bias = None if bias is None else bias.float().contiguous()
    return ConvWeight(panels, bias, tuple(taps), time_stride, stride, phases, outputs, kind)


def causal_conv(
    x: torch.Tensor,
    weight: ConvWeight,
    *,
    residual: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution above; no frame sees a later one. For inference: it has no gradient.

    x: float32 [B, T, H, W, C], T a multiple of the time stride, H and W of the stride; empty gives empty.
    weight: from `prepare_conv`, on x's device.
    residual: float32, added to the result.
    past: float32 [B, taps in time - time stride, H, W, C], the frames before x; zeros where it is None.

    Returns float32 [B, T / time_stride * phases, H / stride, W / stride, outputs]; twice H and W with upsample.
    Raises TypeError or ValueError for wrong dtypes, shapes or devices, and RuntimeError where autograd would need a
    gradient.
    """
    w = weight
    return _causal_conv_op(
        x, w.weight, w.bias, residual, past, w.kind, list(w.taps), w.time_stride, w.stride, w.phases, w.outputs
    )


def causal_conv_ref(
    x: torch.Tensor,
    weight: ConvWeight,
    *,
    residual: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `causal_conv`: the taps that the prepared weights stand for, in PyTorch's convolution;
    x, residual and past may be float64, and it then computes so."""
    w = weight
    arguments = x, w.weight, w.bias, residual, past, w.kind, list(w.taps), w.time_stride, w.stride, w.phases, w.outputs
    _check_causal_conv(*arguments, floats=(torch.float32, torch.float64))
    return _causal_conv_reference(*arguments)


def norm_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """silu(LN(x) * weight + bias) over the last dimension, in one pass. For inference: it has no gradient.

    x: [..., d] float32, bfloat16 or float16. weight, bias: float32 [d]. Returns x's shape and dtype, contiguous; empty
    for an empty x. Statistics and arithmetic are float32, rounded once.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or eps, and RuntimeError where autograd would need
    a gradient.
    """
    return _norm_silu_op(x, weight, bias, eps)


def norm_silu_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """The specification of `norm_silu` in plain PyTorch; it takes float64 too and then computes so."""
    _check_norm_silu(x, weight, bias, eps, (*checks.FLOATS, torch.float64))
    return _norm_silu_reference(x, weight, bias, eps)


# transforms: polynomials through points; the kernel has the inverse ones


def _nodes(kind: int) -> list[list[float]]:
    """[points + infinity, 3]: what the weights w0 + w1 x + w2 x^2 of one axis are multiplied with."""
    points = [0.0, 1.0, -1.0] if kind == UPSAMPLE else [0.0, 1.0, -1.0, 0.5, -2.0]
    rows = []
    for point in points:
        # what the polynomial that vanishes at all other points gives here
        by = 1.0
        for other in points:
            by *= point - other if other != point else 1.0
        rows.append([1 / by, point / by, point * point / by])
    rows.append([0.0, 0.0, 1.0])
    if kind == UPSAMPLE:
        # of repeated pixels the product at -1 is zero
        del rows[2]
    return rows


def _panels(weight: torch.Tensor, kind: int, phases: int) -> torch.Tensor:
    """[phases * outputs, C, t, h, w] -> float32 [panels, products, depth, PANEL], computed in float64."""
    rows, channels, *taps = weight.shape
    outputs = rows // phases
    if kind == DIRECT:
        by, depth = None, channels * taps[0] * taps[1] * taps[2]
    else:
        nodes = torch.tensor(_nodes(kind), dtype=torch.float64, device=weight.device)
        by = nodes if kind == TIME else torch.kron(nodes, nodes)
        depth = channels if kind == TIME else taps[0] * channels
    products = 1 if by is None else len(by)
    panels = weight.new_zeros(phases, -(-outputs // PANEL), products, depth, PANEL, dtype=torch.float32)
    for phase in range(phases):
        for i, part in enumerate(weight[phase * outputs : (phase + 1) * outputs].split(PANEL)):
            # [taps, channels, outputs] with the transformed taps first
            part = part.permute(2, 3, 4, 1, 0)
            if kind == TIME:
                part = by @ part.flatten(1).double()
            elif by is not None:
                part = by @ part.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1).double()
            panels[phase, i, ..., : min(PANEL, outputs - i * PANEL)] = part.reshape(products, depth, -1)
    return panels.flatten(0, 1)


# [kind][tap][product]: the inverse of the nodes, in Python's numbers, which need no copy to a device
_BACK = {
    kind: torch.linalg.pinv(torch.tensor(_nodes(kind), dtype=torch.float64)).tolist() for kind in (SPACE, UPSAMPLE)
}
_BACK[TIME] = _BACK[SPACE]


def _inverse(products: torch.Tensor, dim: int, kind: int) -> torch.Tensor:
    parts = products.unbind(dim)
    taps = [sum(by * part for by, part in zip(row, parts, strict=True) if by) for row in _BACK[kind]]
    return torch.stack(taps, dim)


def _taps(weight, kind, taps, phases, outputs) -> torch.Tensor:
    """The weights [phases * outputs, C, t, h, w] that prepared ones stand for, in float64."""
    rows = weight.double().permute(0, 3, 1, 2).unflatten(0, (phases, -1)).flatten(1, 2)[:, :outputs].flatten(0, 1)
    if kind == DIRECT:
        return rows[:, 0].unflatten(1, (*taps, -1)).permute(0, 4, 1, 2, 3)
    if kind == TIME:
        return _inverse(rows, 1, kind).transpose(1, 2)[..., None, None]
    side = len(_BACK[kind][0])
    square = rows.unflatten(2, (taps[0], -1)).unflatten(1, (side, side))
    return _inverse(_inverse(square, 1, kind), 2, kind).permute(0, 4, 3, 1, 2)


# validation


def _check_causal_conv(
    x, weight, bias, residual, past, kind, taps, time_stride, stride, phases, outputs, floats=(torch.float32,)
):
    checks.tensor("x", x, floats, 5)
    batch, frames, height, width, channels = x.shape
    if frames % time_stride or height % stride or width % stride:
        need = f"have frames and sides that are multiples of {time_stride} and {stride}"
        checks.reject("x", need, list(x.shape))
    depth = channels * (1 if kind == TIME else taps[0] if kind in (SPACE, UPSAMPLE) else taps[0] * taps[1] * taps[2])
    shapes = {
        "weight": (phases * -(-outputs // PANEL), (1, 36, 9, 6)[kind], depth, PANEL),
        "bias": (phases * outputs,),
        "residual": _out_shape(x, kind, time_stride, stride, phases, outputs),
        "past": (batch, taps[0] - time_stride, height, width, channels),
    }
    for (name, shape), value in zip(shapes.items(), (weight, bias, residual, past), strict=True):
        if value is not None:
            checks.tensor(name, value, (x.dtype if name in ("residual", "past") else torch.float32,))
            checks.shape(name, value, shape)
            checks.same_device(name, value, "x", x)


def _check_norm_silu(x, weight, bias, eps, floats=checks.FLOATS):
    checks.tensor("x", x, floats)
    if x.dim() < 1:
        checks.reject("x", "have at least 1 dimension", 0)
    if not 0 <= eps < float("inf"):
        checks.reject("eps", "be finite and at least 0", eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, value in (("weight", weight), ("bias", bias)):
        checks.tensor(name, value, (wide,))
        checks.shape(name, value, (x.shape[-1],))
        checks.same_device(name, value, "x", x)


# the ops


def _out_shape(x, kind, time_stride, stride, phases, outputs) -> tuple[int, ...]:
    batch, frames, height, width, _ = x.shape
    repeat = 2 if kind == UPSAMPLE else 1
    return batch, frames // time_stride * phases, height // stride * repeat, width // stride * repeat, outputs


def _causal_conv_reference(x, weight, bias, residual, past, kind, taps, time_stride, stride, phases, outputs):
    full = _taps(weight, kind, taps, phases, outputs).to(x.dtype)
    past = x.new_zeros(len(x), taps[0] - time_stride, *x.shape[2:]) if past is None else past
    x = torch.cat([past, x], 1)
    x = x.permute(0, 4, 1, 2, 3)
    if kind == UPSAMPLE:
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    high, wide = taps[1] - 1, taps[2] - 1
    x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2) if stride == 1 else (0, wide, 0, high))
    # [B, phases * outputs, t, h, w] -> [B, t * phases, h, w, outputs]
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv3d(x, full, bias, (time_stride, stride, stride))
    y = y.unflatten(1, (phases, outputs)).permute(0, 3, 1, 4, 5, 2).flatten(1, 2)
    return y if residual is None else y + residual


def _norm_silu_reference(x, weight, bias, eps):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # not F.layer_norm, whose forward-mode derivative is not differentiated rightly
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return F.silu(normed * weight + bias).to(x.dtype)


_causal_conv_op = library.Op(
    "causal_conv",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? past, int kind, int[] taps, int time_stride, "
    "int stride, int phases, int outputs) -> Tensor",
    check=_check_causal_conv,
    reference=_causal_conv_reference,
    fake=lambda x, weight, bias, residual, past, kind, taps, *rest: x.new_empty(_out_shape(x, kind, *rest)),
    inference=True,
)

_norm_silu_op = library.Op(
    "norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    check=_check_norm_silu,
    reference=_norm_silu_reference,
    fake=lambda x, weight, bias, eps: x.new_empty(x.shape),
    triton="norm_silu",
    cuda_order=("triton",),
    unsupported={"triton": too_wide},
    inference=True,
)
