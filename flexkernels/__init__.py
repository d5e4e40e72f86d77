"""Structured attention, FSQ quantisation and flow-ODE solver steps as PyTorch ops."""

from . import solvers
from .attention import attention, attention_ref
from .flow import APG, CFG, flow_step, flow_step_ref, flow_update, flow_update_, flow_update_ref
from .fsq import fsq_dequantize, fsq_dequantize_ref, fsq_quantize, fsq_quantize_ref
from .fsq_linear import fsq_embed, fsq_embed_ref, fsq_project_quantize, fsq_project_quantize_ref
from .layout import SequenceLayout
from .library import available_backends, backend
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
    "flow_update",
    "flow_update_",
    "flow_update_ref",
    "fsq_dequantize",
    "fsq_dequantize_ref",
    "fsq_embed",
    "fsq_embed_ref",
    "fsq_project_quantize",
    "fsq_project_quantize_ref",
    "fsq_quantize",
    "fsq_quantize_ref",
    "solvers",
]
