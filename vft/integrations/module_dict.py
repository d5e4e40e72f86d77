"""How published FlexTok and VideoFlexTok code describes a model: modules that read and write entries of a dictionary.

Both tokenizers are a codec, an encoder, an FSQ module and a decoder; encoder and decoder are each a
SequentialModuleDictWrapper of named modules. :func:`describe` reads the configuration off live ones, in the schema that
``vft.config`` parses; :class:`Keys` are the entries that the two sides read and write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

# the schema that vft.config parses
SCHEMA = "videoflextok."
WRAPPER = f"{SCHEMA}model.utils.wrappers.SequentialModuleDictWrapper"
LAYER_NORM_EPS = 1e-5

Reader = Callable[[nn.Module], dict[str, Any]]


def _patch_embedder(m) -> dict[str, Any]:
    return {"patch_sizes": list(m.patch_sizes), "channels_in": m.dim_in, "dim": m.dim_out}


def _posemb(m) -> dict[str, Any]:
    names = ("dim", "posemb_type", "posemb_scaling", "read_key", "write_key")
    return {name: getattr(m, name) for name in names} | {"max_sizes": list(m.max_sizes)}


def _registers(m) -> dict[str, Any]:
    sizes = {"t_max": m.t_max, "n_max": m.n_max, "n_eval": m.n_eval}
    return {"dim": m.registers.shape[-1], "ordering_mode": m.ordering_mode, **sizes}


def _packer(m) -> dict[str, Any]:
    switches = m.cross_timestep_attention_config
    return {"mask_mode": m.mask_mode} | ({"cross_timestep_attention_config": dict(switches)} if switches else {})


def _transformer(m) -> dict[str, Any]:
    block = m.blocks[0]
    attn, mlp = block.attn, block.mlp
    norms = (block.norm1, block.norm2, attn.q_norm, attn.k_norm)
    plain = all(getattr(n, "eps", None) == LAYER_NORM_EPS and n.weight is None and n.bias is None for n in norms)
    if not plain or attn.scale != 8 / attn.head_dim or not isinstance(mlp.act, nn.SiLU):
        raise ValueError(
            f"FlexTransformer must have plain LayerNorms of eps {LAYER_NORM_EPS}, norms of q and k, a softmax scale of "
            "8 / head_dim and SiLU"
        )
    # the smallest m with int(2 m / 3) hidden units, and a ratio that gives it
    hidden = mlp.fc1.out_features
    ratio = (-(-3 * hidden // 2) + 0.5) / block.dim
    biases = {"qkv_bias": attn.wq, "proj_bias": attn.proj, "mlp_bias": mlp.fc1}
    return {
        "dim": block.dim, "depth": len(m.blocks), "head_dim": attn.head_dim, "mlp_ratio": ratio,
        "gated_mlp": hasattr(mlp, "fc3"), "adaLN_expansion": getattr(block, "adaLN_expansion", 1),
        "rope_forward_read_key": m.rope_forward_read_key, "score_mod_read_key": m.score_mod_read_key,
        **{name: linear.bias is not None for name, linear in biases.items()},
    }  # fmt: skip


def _linear_head(m) -> dict[str, Any]:
    if getattr(m.norm, "eps", None) != LAYER_NORM_EPS or m.norm.weight is not None:
        raise ValueError(f"{type(m).__name__} must have a plain LayerNorm of eps {LAYER_NORM_EPS}")
    modulation = getattr(m, "adaLN_modulation", None)
    return {
        "dim": m.dim_in, "dim_out": m.dim_out, "use_mup_readout": type(m.proj) is not nn.Linear,
        "proj_bias": m.proj.bias is not None, "adaLN_emb_read_key": modulation and "time",
        "adaLN_bias": modulation is None or modulation[1].bias is not None,
    }  # fmt: skip


def _patches_head(m) -> dict[str, Any]:
    entry, patch = _linear_head(m), list(m.patch_sizes)
    return entry | {"patch_sizes": patch, "channels_out": entry.pop("dim_out") // math.prod(patch)}


# what the configuration says about each class
READERS: dict[str, Reader] = {
    "PerSampleOp": lambda m: {},
    "PatchEmbedder": _patch_embedder,
    "PositionalEmbeddingAdder": _posemb,
    "RegistersTemporal2D": _registers,
    "BlockWiseSequenceInterleavePacker": _packer,
    "SequenceInterleavedUnpacker": lambda m: {},
    "FlexTransformer": _transformer,
    "LinearHead": _linear_head,
    "ToPatchesLinearHead": _patches_head,
    "LinearLayer": lambda m: {
        "write_key": m.write_key, "dim_in": m.dim_in, "dim": m.dim_out, "proj_bias": m.proj.bias is not None,
    },
    "MaskedNestedDropout": lambda m: {"read_write_key": m.read_write_key, "dim": m.dim},
    "MaskedPrefixDropout": lambda m: {"read_write_key": m.read_write_key, "dim": m.dim},
    "LearnedNullCond": lambda m: {
        "read_write_key": m.read_write_key, "dim": m.dim, "replace_with_single_token": m.replace_with_single_token,
    },
    "TimestepEmbedder": lambda m: {
        "frequency_embedding_size": m.frequency_embedding_size, "max_timestep": m.max_timestep,
        "temb_as_tokens": m.temb_as_tokens, "dim": m.mlp[0].out_features,
    },
    "TransformerHead": lambda m: {},
}  # fmt: skip


def describe(model: nn.Module, readers: Mapping[str, Reader], encoder: bool) -> dict[str, Any]:
    """The configuration tree of a live tokenizer; without its encoder, a stand-in that fits the decoder is described.

    Raises ValueError naming a module that computes something else than its class says.
    """
    decoder = _describe_side("decoder", model.decoder, readers)
    return {
        "_target_": f"{SCHEMA}wrappers.VideoFlexTok",
        "encoder": _describe_side("encoder", model.encoder, readers) if encoder else _stand_in(model, decoder),
        "decoder": decoder,
        "regularizer": {
            "_target_": f"{SCHEMA}regularizers.quantize_fsq.FSQ",
            "levels": model.regularizer._levels.tolist(),
        },
    }


def _describe_side(side: str, wrapper: nn.Module, readers: Mapping[str, Reader]) -> dict[str, Any]:
    entries = {}
    for name, module in wrapper.module_dict.items():
        if "forward" in vars(module):
            raise ValueError(f"{side}.{name} must compute what its class does, but its forward was replaced")
        kind = type(module)
        # a class that has no reader is refused by name when the configuration is parsed
        path = f"{kind.__module__}.{kind.__qualname__}".partition(".")[2]
        read = readers.get(kind.__qualname__, lambda m: {})
        try:
            entries[name] = {"_target_": SCHEMA + path} | read(module)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{side}.{name} does not have the structure of {kind.__qualname__}: {error}") from error
    return {"_target_": WRAPPER, "module_dict": entries}


def _stand_in(model: nn.Module, decoder: dict[str, Any]) -> dict[str, Any]:
    """An encoder of the right registers and channels, for a configuration that must have one."""
    table = _one(model.encoder.module_dict.values(), "Registers1D", "RegistersTemporal2D")
    patches = next(e for e in decoder["module_dict"].values() if e["_target_"].endswith(".PatchEmbedder"))
    trunk = next(e for e in decoder["module_dict"].values() if e["_target_"].endswith(".FlexTransformer"))
    levels = len(model.regularizer._levels)
    registers = {"dim": trunk["dim"], "t_max": getattr(table, "t_max", 1), "n_max": table.n_max, "n_eval": table.n_eval}
    packer = f"{SCHEMA}model.preprocessors.flex_seq_packing.BlockWiseSequenceInterleavePacker"
    entries = {
        "patches": patches,
        "registers": {"_target_": f"{SCHEMA}model.preprocessors.registers.RegistersTemporal2D", **registers},
        "packer": {"_target_": packer, "mask_mode": "full"},
        "transformer": trunk | {"depth": 0},
        "head": {
            "_target_": f"{SCHEMA}model.postprocessors.heads.LinearHead", "dim": trunk["dim"], "dim_out": levels,
        },
    }  # fmt: skip
    return {"_target_": WRAPPER, "module_dict": entries}


@dataclass(frozen=True)
class Keys:
    """The dictionary's entries that encoder and decoder read and write; None for one that is never read."""

    quants: str
    keep: str | None
    prefix: str | None
    null: str | None
    noised: str
    timesteps: str
    velocity: str
    latents: str | None = None
    register_sizes: str | None = None
    values: str | None = None

    @classmethod
    def of(cls, model: nn.Module, encoder: bool) -> Keys:
        """Raises ValueError where the modules are wired in another way than published models are."""
        decoder = list(model.decoder.module_dict.values())
        embed = _one(decoder, "LinearLayer")
        _check_packer(decoder, embed.write_key)
        written = _one(decoder, "ToPatchesLinearHead").write_key
        eval_key = lambda kind, name: getattr(_one(decoder, kind, required=False), name, None)  # noqa: E731
        return cls(
            quants=embed.read_key,
            keep=eval_key("MaskedNestedDropout", "eval_keep_k_read_key"),
            prefix=eval_key("MaskedPrefixDropout", "eval_prefix_len_read_key"),
            null=eval_key("LearnedNullCond", "eval_drop_flag_read_key"),
            noised=_before(decoder), timesteps=_one(decoder, "TimestepEmbedder").timesteps_read_key,
            velocity=_transpose(decoder, "read_key", written).write_key,
            **(_encoder_keys(model.encoder) if encoder else {}),
        )  # fmt: skip


def _encoder_keys(encoder: nn.Module) -> dict[str, str]:
    modules = list(encoder.module_dict.values())
    registers = _one(modules, "Registers1D", "RegistersTemporal2D")
    _check_packer(modules, registers.registers_write_key)
    return {
        "latents": _before(modules), "register_sizes": registers.register_sizes_read_write_key,
        "values": _one(modules, "LinearHead").write_key,
    }  # fmt: skip


def _check_packer(modules: list[nn.Module], registers: str) -> None:
    keys = _one(modules, "BlockWiseSequencePacker", "BlockWiseSequenceInterleavePacker").input_list_read_keys
    if len(keys) != 2 or keys[1] != registers:
        raise ValueError(f"a packer must read the patches and then {registers!r}, got {list(keys)}")


def _one(modules: Iterable[nn.Module], *kinds: str, required: bool = True) -> nn.Module | None:
    found = next((m for m in modules if type(m).__name__ in kinds), None)
    if found is None and required:
        raise ValueError(f"a published tokenizer must have a {' or '.join(kinds)}")
    return found


def _before(modules: list[nn.Module]) -> str:
    return _transpose(modules, "write_key", _one(modules, "PatchEmbedder").input_tensor_list_read_key).read_key


def _transpose(modules: list[nn.Module], side: str, key: str) -> nn.Module:
    """The PerSampleOp that moves the channels of latents under `key`."""
    for module in modules:
        if type(module).__name__ == "PerSampleOp" and getattr(module, side) == key:
            name = getattr(module.per_sample_op, "func", module.per_sample_op).__name__
            if name in ("channels_first_to_last", "channels_last_to_first"):
                return module
    raise ValueError(f"{key!r} must come from or go to latents with channels first")
