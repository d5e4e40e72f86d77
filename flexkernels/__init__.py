"""Structured attention, FSQ quantisation and flow-ODE solver steps as PyTorch ops."""

from .attention import attention, attention_ref
from .conv import ConvWeight, causal_conv, causal_conv_ref, norm_silu, norm_silu_ref, prepare_conv
from .decode import decode_attention, decode_attention_ref, kv_append_, kv_append_ref_
from .flow import APG, CFG, Prefix, flow_step, flow_step_ref, flow_update, flow_update_, flow_update_ref
from .fsq import fsq_dequantize, fsq_dequantize_ref, fsq_quantize, fsq_quantize_ref
from .fsq_linear import fsq_embed, fsq_embed_ref, fsq_project_quantize, fsq_project_quantize_ref
from .fsq_train import fsq_quantize_train, fsq_quantize_train_ref
from .head_norm import qk_norm, qk_norm_ref
from .integrations import accelerate, restore
from .layout import SequenceLayout
from .library import available_backends, backend
from .linear import quantize_rows, skinny_linear, skinny_linear_ref
from .norm import (
    adaln_norm,
    adaln_norm_ref,
    gated_residual,
    gated_residual_adaln_norm,
    gated_residual_adaln_norm_ref,
    gated_residual_ref,
    rms_norm,
    rms_norm_ref,
    swiglu,
    swiglu_ref,
)
from .sampling import sample_logits, sample_logits_ref
from .transformer import (
    BlockWeights,
    StackWeights,
    prefers_persistent_step,
    transformer_step_,
    transformer_step_ref_,
    transformer_step_refusal,
)
from .varlen import flash_attn_varlen_func
from .version import __version__

__all__ = [
    "APG",
    "CFG",
    "BlockWeights",
    "ConvWeight",
    "Prefix",
    "SequenceLayout",
    "StackWeights",
    "__version__",
    "accelerate",
    "adaln_norm",
    "adaln_norm_ref",
    "attention",
    "attention_ref",
    "available_backends",
    "backend",
    "causal_conv",
    "causal_conv_ref",
    "decode_attention",
    "decode_attention_ref",
    "flash_attn_varlen_func",
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
    "fsq_quantize_train",
    "fsq_quantize_train_ref",
    "gated_residual",
    "gated_residual_adaln_norm",
    "gated_residual_adaln_norm_ref",
    "gated_residual_ref",
    "kv_append_",
    "kv_append_ref_",
    "norm_silu",
    "norm_silu_ref",
    "prefers_persistent_step",
    "prepare_conv",
    "qk_norm",
    "qk_norm_ref",
    "quantize_rows",
    "restore",
    "rms_norm",
    "rms_norm_ref",
    "sample_logits",
    "sample_logits_ref",
    "skinny_linear",
    "skinny_linear_ref",
    "swiglu",
    "swiglu_ref",
    "transformer_step_",
    "transformer_step_ref_",
    "transformer_step_refusal",
]
