"""Which targets and fields of a published config are read, which matter in training alone, and which are refused.

The tree consists of ``_target_`` entries. Nothing a file names is ever imported or called.
"""

from __future__ import annotations

from typing import Any

ROOT = "videoflextok."


class ConfigError(ValueError):
    """The configuration asks for something that is not allowed or not known; the message names it."""


# fields that matter in training alone, or for precision, padding and compilation of the published code
_INERT = {
    "weight_init_style", "drop", "drop_path_rate", "use_act_checkpoint", "zero_init_query_proj", "compile",
    "dropout_prob", "size_sampling_mode", "zipf_a", "flatten_patches", "pad_to_multiple", "max_seq_len",
    "compile_block_mask", "n_min", "dtype_override", "intermediate_layers", "drop_quant_p", "corrupt_tokens_p",
    "min_corrupt_tokens_p", "apply_corrupt_tokens_p", "packed_call", "prefix_len", "keep_prefix_prob", "ln",
    "stratisfied", "mode_scale", "force_vae_encode", "cond_sigma_min", "cond_sigma_max", "cond_sigma_range",
    "cond_noise_prob", "per_subseq_embs", "_partial_", "enable_mup_init", "repa_mask_mode", "repa_patch_index",
}  # fmt: skip
# fields whose every other value would change the computation: refused
_FIXED = {
    "gated_mlp": (True,), "qk_norm": (True,), "use_mup_readout": (False,), "posemb_scaling": ("absolute",),
    "adaLN_expansion": (1, 2), "temb_as_tokens": (False,), "replace_with_single_token": (False,),
    "zero_noise": (False,), "ordering_mode": ("nested",), "rope_forward_read_key": (None,),
    "score_mod_read_key": (None,), "extra_registers_write_key": (None,), "extra_registers_dim": (None,),
}  # fmt: skip

_TARGETS: dict[str, set[str]] = {
    "wrappers.VideoFlexTok": {"vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline"},
    "compressors.vidtok.VidTokVAE": {"tokenizer_id"},
    "model.utils.wrappers.SequentialModuleDictWrapper": {"module_dict"},
    "model.utils.dict_ops.PerSampleOp": {"per_sample_op"},
    "model.utils.dict_ops.channels_first_to_last": set(),
    "model.utils.dict_ops.channels_last_to_first": set(),
    "model.utils.posembs.PositionalEmbeddingAdder": {"dim", "max_sizes", "posemb_type"},
    "model.preprocessors.patching.PatchEmbedder": {"patch_sizes", "channels_in", "dim"},
    "model.preprocessors.registers.RegistersTemporal2D": {"dim", "t_max", "n_max", "n_eval", "size_sampling_mode"},
    "model.preprocessors.flex_seq_packing.BlockWiseSequenceInterleavePacker": {
        "mask_mode", "cross_timestep_attention_config", "input_list_read_keys",
    },
    "model.preprocessors.linear.LinearLayer": {"dim_in", "dim", "proj_bias"},
    "model.preprocessors.token_dropout.MaskedNestedDropout": {"dim"},
    "model.preprocessors.token_dropout.MaskedPrefixDropout": {"dim"},
    "model.preprocessors.nullcond.LearnedNullCond": {"dim"},
    "model.preprocessors.time_embedding.TimestepEmbedder": {"dim", "frequency_embedding_size", "max_timestep"},
    "model.trunks.transformers.FlexTransformer": {
        "dim", "depth", "head_dim", "mlp_ratio", "qkv_bias", "proj_bias", "mlp_bias", "adaLN_expansion",
    },
    "model.postprocessors.seq_unpacking.SequenceInterleavedUnpacker": {"inner_seq_write_keys"},
    "model.postprocessors.heads.LinearHead": {"dim", "dim_out", "proj_bias", "adaLN_bias"},
    "model.postprocessors.heads.ToPatchesLinearHead": {
        "dim", "channels_out", "patch_sizes", "proj_bias", "adaLN_bias",
    },
    "regularizers.quantize_fsq.FSQ": {"levels"},
    "flow_matching.pipelines.VideoMinRFPipeline": {"out_channels"},
    "flow_matching.noise_modules.PrefixMinRFNoiseModule": set(),
    "flow_matching.noise_modules.MinRFNoiseModule": set(),
}  # fmt: skip
# heads used by training losses alone: their fields and keys are not read
SKIPPED = {"model.postprocessors.heads.TransformerHead"}
_ALIASES = {"resamplers.video_wrappers.VideoFlowMatchingResampler": "wrappers.VideoFlexTok"}


def field_of(entry: dict, key: str, where: str) -> Any:
    """A field that must be there."""
    if key not in entry:
        raise ConfigError(f"{where} must have the field {key!r}")
    return entry[key]


def target_of(entry: Any, where: str) -> str:
    """The allowed ``_target_`` of an entry, without its root."""
    target = entry.get("_target_") if isinstance(entry, dict) else None
    name = target.removeprefix(ROOT) if isinstance(target, str) and target.startswith(ROOT) else None
    name = _ALIASES.get(name or "", name)
    if name not in _TARGETS and name not in SKIPPED:
        raise ConfigError(f"{where} must have an allowed _target_, got {target!r}")
    return name


def kind_of(entry: Any, where: str) -> str:
    """The class name of an entry's target."""
    return target_of(entry, where).rsplit(".", 1)[-1]


def check_tree(entry: Any, where: str) -> None:
    """Every ``_target_`` is allowed and every field of it is known and supported."""
    target = target_of(entry, where)
    if target in SKIPPED:
        return
    for key, value in entry.items():
        path = f"{where}.{key}"
        if key in _FIXED and value not in _FIXED[key]:
            raise ConfigError(f"{path} must be {' or '.join(map(repr, _FIXED[key]))}, got {value!r}")
        known = key in _TARGETS[target] or key in _FIXED or key in _INERT or key == "_target_" or key.endswith("_key")
        if not known and not key.endswith("_keys") and not (key == "chunk_size" and value is None):
            raise ConfigError(f"{path} is not a known field of {target}")
        if key == "module_dict":
            for name, module in value.items():
                check_tree(module, f"{where}.{name}")
        elif isinstance(value, dict) and key != "cross_timestep_attention_config":
            check_tree(value, path)
