"""torch's registry of flash attention: an implementation "flexkernels" behind `torch.nn.attention.varlen`.

    from flexkernels.integrations import torch_attention
    torch_attention.register()
    torch.nn.attention.activate_flash_attention_impl("flexkernels")
    out = torch.nn.attention.varlen.varlen_attn(q, k, v, cu_seq, cu_seq, max_length, max_length, window_size=(-1, 0))

Served: packed sequences given by offsets, full and causal, fewer heads of keys, float32, bfloat16 and float16, and
their gradients, on CUDA and on the CPU, where torch has no such kernel. Everything else that reaches the same operators
(padded batches, sliding windows, dropout, paged caches) goes to torch's own kernel for that device, where it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..attention import MAX_HEAD_DIM, _attention_backward_op
from ..checks import FLOATS
from ..varlen import _layout, flash_attn_varlen_func

NAME = "flexkernels"
DEVICES = ("CPU", "CUDA")


def register() -> None:
    """Adds the implementation, which `activate_flash_attention_impl` then puts in place; again changes nothing.

    Raises RuntimeError where torch has no such registry.
    """
    add = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if add is None:
        raise RuntimeError(f"torch must have torch.nn.attention.register_flash_attention_impl, got {torch.__version__}")
    add(NAME, register_fn=Active)


class Active:
    """The implementation in place of torch's kernels, until :meth:`remove`, which the registry calls."""

    def __init__(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        for device in DEVICES:
            for name, implementation in _IMPLEMENTATIONS.items():
                self.library.impl(name, _with_fallback(name, device, implementation), device, with_keyset=True)

    def remove(self) -> None:
        self.library._destroy()


def _with_fallback(name: str, device: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation, and where it does not serve a call, what the device has without it."""
    try:
        original = torch.library.get_kernel(f"aten::{name}", device)
    except RuntimeError:
        # torch has none for this device
        original = None

    def call(keyset: torch.DispatchKeySet, *args: Any, **options: Any) -> Any:
        result = implementation(*args, **options)
        if result is not NotImplemented:
            return result
        if original is None:
            raise ValueError(
                f"{name} on {device} must have packed sequences with offsets, full or causal, without dropout, of "
                f"float32, bfloat16 or float16 and a head_dim up to {MAX_HEAD_DIM}, as torch has no kernel of its own "
                f"there, got another call"
            )
        return original.call_boxed(keyset, *args, **options)

    return call


def _causal(
    query: torch.Tensor, key: torch.Tensor, offsets: tuple[Any, Any], dropout_p: float, is_causal: bool,
    window_size_left: int | None = None, window_size_right: int | None = None, **rest: Any,
) -> bool | None:  # fmt: skip
    """Whether the attention is causal; None where it is none that these kernels serve.

    rest: further options, served where they are None. The number of splits is one of speed alone.
    """
    packed = query.dim() == key.dim() == 3 and all(isinstance(x, torch.Tensor) for x in offsets)
    known = query.dtype in FLOATS and packed and 1 <= query.shape[2] <= MAX_HEAD_DIM
    asked = any(value is not None for name, value in rest.items() if name != "num_splits")
    if not known or dropout_p or asked or window_size_left not in (None, -1):
        return None
    # a window that ends at the query itself is causal
    return True if window_size_right == 0 else is_causal if window_size_right in (None, -1) else None


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool,
    *, scale: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    """out like query; lse float32 ``[heads, total_q]``; a state of random numbers, a rest and a mask, all unused."""
    causal = _causal(query, key, (cum_seq_q, cum_seq_k), dropout_p, is_causal, **options)
    if causal is None or return_debug_mask:
        return NotImplemented
    out, lse, _ = flash_attn_varlen_func(
        query, key, value, cum_seq_q, cum_seq_k, softmax_scale=scale, causal=causal, return_attn_probs=True
    )
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return out, lse, state, unused, query.new_empty(0)


def _forward_into(out: torch.Tensor, *args: Any, **options: Any) -> Any:
    """lse; the result is written to ``out``."""
    results = _forward(*args, **options)
    if results is NotImplemented:
        return results
    out.copy_(results[0])
    return results[1]


def _backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    logsumexp: torch.Tensor, cum_seq_q: torch.Tensor, cum_seq_k: torch.Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, rng_state: torch.Tensor, unused: torch.Tensor,
    *, scale: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Gradients of query, key and value."""
    causal = _causal(query, key, (cum_seq_q, cum_seq_k), dropout_p, is_causal, **options)
    if causal is None:
        return NotImplemented
    layout, *rest = _layout(cum_seq_q, cum_seq_k, "causal" if causal else "full").arguments
    return _attention_backward_op(grad_out, query, key, value, out, logsumexp, layout, None, *rest, scale)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_into,
    "_flash_attention_backward": _backward,
}
