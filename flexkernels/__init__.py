"""Structured attention, FSQ quantisation and flow-ODE solver steps as PyTorch ops."""

from .attention import attention, attention_ref
from .flow import APG, CFG, flow_step, flow_step_ref
from .fsq import fsq_dequantize, fsq_dequantize_ref, fsq_quantize, fsq_quantize_ref
from .layout import SequenceLayout
from .library import available_backends, backend
from .linear import quantize_rows, skinny_linear, skinny_linear_ref
from .sampling import sample_logits, sample_logits_ref
from .version import __version__

__all__ = [
    "APG",
    "CFG",
    "SequenceLayout",
    "__version__",
    "attention",
    "attention_ref",
    "available_backends",
    "backend",
    "flow_step",
    "flow_step_ref",
    "fsq_dequantize",
    "fsq_dequantize_ref",
    "fsq_quantize",
    "fsq_quantize_ref",
    "quantize_rows",
    "sample_logits",
    "sample_logits_ref",
    "skinny_linear",
    "skinny_linear_ref",
]
