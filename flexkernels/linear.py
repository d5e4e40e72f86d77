"""A linear layer for the few rows of a decoding step: `skinny_linear`, its reference, and `quantize_rows` for int8.

    y = (norm(x) @ weight.T) * weight_scale + bias,   swiglu: y = silu(y[:, :h]) * y[:, h:],   out = y + residual

norm is `rms_norm` where it is asked for. At so few rows reading the weight is all the cost, so it is read once, and
what is before and after it costs no pass.
"""

from __future__ import annotations

import torch

from . import checks, library, norm_math
from .norm import too_wide

MAX_ROWS = 16
INT8_LARGEST = 127


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    weight_scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> torch.Tensor:
    """The linear layer above for at most 16 rows of x; [m, n'] in x's dtype. For inference: it has no gradient.

    x: [m, k] float32, bfloat16 or float16, m <= 16; rows may be apart. m = 0 gives an empty result, k = 0 a zero
        product.
    weight: [n, k] in x's dtype, or int8 with weight_scale float32 [n], one factor a row (`quantize_rows`).
    bias: [n] in x's dtype. residual: [m, n'] in x's dtype, added last.
    activation: None, n' = n; or "swiglu": weight is [w1; w3], n' = n / 2.
    norm_weight: [k] in x's dtype or float32: `rms_norm(x, norm_weight, eps=norm_eps)`, rounded to x's dtype, takes the
        place of x. On the CPU and CUDA backends the result is that of the two ops bit by bit.

    Sums, bias, activation and residual are in float32, rounded once to x's dtype. Results repeat bit by bit; on the
    CPU and CUDA backends a row of x also gives the same bits alone or among others.
    Raises TypeError or ValueError for wrong dtypes, shapes or devices, and RuntimeError where autograd would need a
    gradient: call it under torch.no_grad().
    Source: arXiv 2002.05202 (SwiGLU).
    """
    return _linear_op(x, weight, weight_scale, bias, residual, _is_swiglu(activation), norm_weight, norm_eps)


def skinny_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    weight_scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> torch.Tensor:
    """The specification of `skinny_linear` in plain PyTorch; it takes float64 too and then computes so."""
    arguments = x, weight, weight_scale, bias, residual, _is_swiglu(activation), norm_weight, norm_eps
    _check_skinny_linear(*arguments, floats=(*checks.FLOATS, torch.float64))
    return _skinny_linear_reference(*arguments)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [n, k], float, as int8 [n, k] and float32 scale [n]: weight is about int8 * scale, row by row.

    Symmetric: scale is a row's largest magnitude over 127, values round to the nearest, so each is off by at most
    scale / 2 (and float32 rounding). A row of zeros has the scale 0. Raises ValueError for values that are not
    finite: it looks at them, which waits for a GPU.
    """
    checks.tensor("weight", weight, (*checks.FLOATS, torch.float64), 2)
    wide = weight.detach().float()
    if not bool(wide.isfinite().all()):
        checks.reject("weight", "be finite", "inf or NaN")
    largest = wide.abs().amax(1) if weight.shape[1] else wide.new_zeros(weight.shape[0])
    scale = largest / INT8_LARGEST
    # a subnormal scale is too coarse to divide by
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    quotient = wide / torch.where(scale > 0, scale, 1.0)[:, None]
    return quotient.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale


# validation


def _is_swiglu(activation: str | None) -> bool:
    if activation is not None and activation != "swiglu":
        checks.reject("activation", 'be None or "swiglu"', repr(activation))
    return activation is not None


def _check_skinny_linear(
    x, weight, weight_scale, bias, residual, swiglu, norm_weight=None, norm_eps=1e-6, floats=checks.FLOATS
):
    checks.tensor("x", x, floats, 2)
    if x.shape[0] > MAX_ROWS:
        checks.reject("x", f"have at most {MAX_ROWS} rows", x.shape[0])
    checks.tensor("weight", weight, (x.dtype, torch.int8), 2)
    checks.shape("weight", weight, (weight.shape[0], x.shape[1]))
    checks.same_device("weight", weight, "x", x)
    n = weight.shape[0]
    if swiglu and n % 2:
        checks.reject("weight", "have an even number of rows with swiglu", n)
    if weight.dtype == torch.int8:
        scale_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        _check_beside(x, "weight_scale", weight_scale, (scale_dtype,), (n,))
    elif weight_scale is not None:
        checks.reject("weight_scale", "be None unless weight is int8", "a tensor")
    if bias is not None:
        _check_beside(x, "bias", bias, (x.dtype,), (n,))
    if residual is not None:
        _check_beside(x, "residual", residual, (x.dtype,), (x.shape[0], n // 2 if swiglu else n))
    if norm_weight is not None:
        _check_beside(x, "norm_weight", norm_weight, (x.dtype, torch.float32), (x.shape[1],))
        checks.at_least("norm_eps", norm_eps, 0)


def _check_beside(x, name, value, dtypes, shape):
    checks.tensor(name, value, tuple(dict.fromkeys(dtypes)))
    checks.shape(name, value, shape)
    checks.same_device(name, value, "x", x)


# the op


def _skinny_linear_reference(x, weight, weight_scale, bias, residual, swiglu, norm_weight=None, norm_eps=1e-6):
    if norm_weight is not None:
        x = norm_math.root_mean_square_norm(x, norm_weight, norm_eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).T
    if weight_scale is not None:
        y = y * weight_scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if swiglu:
        gate, up = y.chunk(2, 1)
        y = torch.nn.functional.silu(gate) * up
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype)


def _skinny_linear_fake(x, weight, weight_scale, bias, residual, swiglu, norm_weight=None, norm_eps=1e-6):
    n = weight.shape[0]
    return x.new_empty((x.shape[0], n // 2 if swiglu else n))


def _norm_too_wide(x, weight, weight_scale, bias, residual, swiglu, norm_weight=None, norm_eps=1e-6):
    return None if norm_weight is None else too_wide(x)


_linear_op = library.Op(
    "skinny_linear",
    "(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? residual, bool swiglu, "
    "Tensor? norm_weight=None, float norm_eps=1e-6) -> Tensor",
    check=_check_skinny_linear,
    reference=_skinny_linear_reference,
    fake=_skinny_linear_fake,
    triton="linear",
    unsupported={"triton": _norm_too_wide},
    inference=True,
)
