"""What the published FlexTok and VideoFlexTok code have in common, and how `vft` runs over their weights.

Both tokenizers are a codec, an encoder, an FSQ module and a decoder; encoder and decoder are each a
SequentialModuleDictWrapper: named modules that read and write entries of one dictionary. :func:`describe` reads the
configuration off such modules, in the schema that ``vft.config`` parses, and :class:`Engine` stands in for the forwards
of encoder, decoder and FSQ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import flexkernels

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
    return {"dim": m.dim_in, "dim_out": m.dim_out, "use_mup_readout": type(m.proj) is not nn.Linear}


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
    "LinearLayer": lambda m: {"write_key": m.write_key, "dim_in": m.dim_in, "dim": m.dim_out},
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


def share(model: nn.Module, config, encoder: bool):
    """A ``vft.Tokenizer`` whose parameters are the published model's own Parameter objects, or only its decoder's.

    Raises ValueError naming a parameter that is missing or has another shape.
    """
    import vft
    from vft.checkpoint import published_name

    with torch.device("meta"):
        tokenizer = vft.Tokenizer(config, type(model).__name__)
    if not encoder:
        tokenizer.encoder = nn.Identity()
    theirs = dict(model.named_parameters())
    for name, wanted in list(tokenizer.named_parameters()):
        published = published_name(name, config)
        given = theirs.get(published)
        # an image model's registers lack the axis of frames
        if given is None or given.numel() != wanted.numel() or given.shape[-1:] != wanted.shape[-1:]:
            got = "none" if given is None else list(given.shape)
            raise ValueError(f"{published} must have shape {list(wanted.shape)}, got {got}")
        owner, _, leaf = name.rpartition(".")
        setattr(tokenizer.get_submodule(owner), leaf, given)
    return tokenizer.eval()


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of one object; returns what puts it back."""
    held = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before) if held else delattr(owner, name)


class Engine:
    """Computes what a published tokenizer's encoder, FSQ module and decoder do, by ``vft`` over their weights.

    A sample is ``[1, C, T, H, W]``, or ``[1, C, H, W]`` of an image model. Gradients are off.

    Args:
        model: the published tokenizer.
        readers: how its configuration is read, see :func:`describe`.
        encoder: whether its encoder is replaced.
        dtype: None to compute in the weights' dtype, over them; another one computes over a copy cast to it.
        compat, collapse: as in ``vft.Tokenizer.decode_latents``.
    """

    def __init__(
        self, model: nn.Module, readers: Mapping[str, Reader], *, encoder: bool, dtype: torch.dtype | None,
        compat: Iterable[str], collapse: bool,
    ) -> None:  # fmt: skip
        from vft.config import parse_config

        self.keys = Keys.of(model, encoder)
        self.config = parse_config(describe(model, readers, encoder))
        self.decoder, self.regularizer = model.decoder, model.regularizer
        self.encoder = model.encoder if encoder else None
        self.compat, self.collapse = tuple(compat), collapse
        self.published_quantize = model.regularizer.forward_z
        self.tokenizer = share(model, self.config, encoder)
        self.shared = dtype is None or dtype == self.tokenizer.dtype
        if not self.shared:
            self.tokenizer = copy.deepcopy(self.tokenizer).to(dtype).requires_grad_(False)
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Puts this engine behind the modules' forwards. Weights move into joined memory, and need no gradient."""
        if self.shared:
            for parameter in self.tokenizer.parameters():
                if parameter.requires_grad:
                    self._undo.append(lambda p=parameter: p.requires_grad_(True))
                    parameter.requires_grad_(False)
        self._undo.append(self._separate)
        if self.encoder is not None:
            self.replace(self.encoder, "forward", self.encode)
        self.replace(self.decoder, "forward", self.velocity)
        self.replace(self.regularizer, "forward_z", self.quantize)
        self.tokenizer.prepare()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append(replace_attribute(owner, name, value))

    def remove(self) -> None:
        """Undoes :meth:`install`: every weight is bitwise what it was, in memory of its own."""
        while self._undo:
            self._undo.pop()()

    def _separate(self) -> None:
        from vft.layers import Merged

        for module in self.tokenizer.modules():
            if isinstance(module, Merged):
                module.separate()

    def quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes float32 ``[..., D]`` and ids int64 ``[...]``, for the FSQ module's forward_z."""
        if self.regularizer.training:
            return self.published_quantize(z)
        return flexkernels.fsq_quantize(z.float(), self.config.levels)

    @torch.no_grad()
    def encode(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """The encoder's forward: latents -> values before quantisation ``[1, T, N, D]``, or ``[1, N, D]``."""
        keys, n = self.keys, self.config.registers
        self._check_mode(self.encoder)
        sizes = data_dict.get(keys.register_sizes)
        if sizes is not None and any(int(size) != n for size in sizes):
            raise ValueError(f"{keys.register_sizes} must be {n}, the registers of this model, got {list(sizes)}")
        given = data_dict[keys.latents]
        latents = self._samples(keys.latents, given)
        with _no_autocast(latents):
            values = self.tokenizer.prepare().encoder(latents).split([x.shape[1] * n for x in latents])
        shapes = [(1, n) if x.dim() == 4 else (1, x.shape[2], n) for x in given]
        data_dict[keys.values] = [v.view(*shape, -1) for v, shape in zip(values, shapes, strict=True)]
        return data_dict

    @torch.no_grad()
    def velocity(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """The decoder's forward: noised latents, times, codes and what to do with registers -> velocities."""
        keys = self.keys
        self._check_mode(self.decoder)
        given = data_dict[keys.noised]
        latents = self._samples(keys.noised, given)
        codes, keep, prefix, registers = self.read_registers(data_dict, latents)
        null = [bool(flag) for flag in self._read(data_dict, keys.null, len(latents), False)]
        with _no_autocast(latents):
            out = self.tokenizer.prepare().decoder(
                latents, data_dict[keys.timesteps], codes, keep, prefix, null, self.collapse, registers
            )
        data_dict[keys.velocity] = [v.reshape(x.shape) for v, x in zip(out, given, strict=True)]
        return data_dict

    @torch.no_grad()
    def sample(
        self, data_dict, noise, timesteps: int, guidance, prefix=None, prefix_mode: str = "clean", verbose: bool = True
    ) -> list[torch.Tensor]:
        """Integrates the flow from noise by as many Euler steps; conditional and unconditional sequences in one call.

        noise: list of samples; prefix: list of clean first frames ``[1, C, k, H, W]`` or None. Guidance takes its norms
        over T, H and W of each channel of a video, but over C, H and W of an image. Returns a list of float32 samples.
        """
        from vft.solver import evaluations, sample, schedule

        self._check_mode(self.decoder)
        latents = self._samples("noise", noise)
        codes, keep, frames, registers = self.read_registers(data_dict, latents)
        # the very times of the published loop, which a guidance scale may compare with
        plan = evaluations("euler", schedule([i / timesteps for i in range(timesteps, -1, -1)]))
        shapes = [x.shape for x in latents]
        with _no_autocast(latents), tqdm(total=timesteps, disable=not verbose) as bar:
            inner = self.tokenizer.guided_velocity(
                latents, plan, codes, keep, frames, collapse=self.collapse, registers=registers
            )

            def velocity(x, i, guided):
                x = [z.reshape(shape) for z, shape in zip(x, shapes, strict=True)]
                return inner(x, i, guided)

            out = sample(
                velocity, [x[0].float() if x.dim() == 5 else x.float() for x in noise], plan, guidance=guidance,
                prefix=None if prefix is None else [p[0] for p in prefix], prefix_mode=prefix_mode,
                compat=self.compat, progress=lambda done: bar.update(done - bar.n),
            )  # fmt: skip
        return [x.reshape(z.shape) for x, z in zip(out, noise, strict=True)]

    def read_registers(self, data_dict: dict[str, Any], latents: list[torch.Tensor]):
        """Codes ``[sum T*l, D]``, registers kept and frames masked of each sample, and l, the registers of a frame."""
        quants, count, dims = data_dict[self.keys.quants], len(latents), len(self.config.levels)
        registers = quants[0].shape[-2]
        for q, x in zip(quants, latents, strict=True):
            if q.shape[-2:] != (registers, dims) or q.numel() != x.shape[1] * registers * dims:
                raise ValueError(
                    f"{self.keys.quants} must be [1, {x.shape[1]}, {registers}, {dims}] a sample, with the latents' "
                    f"frames and equally many registers, got {list(q.shape)}"
                )
        if not 1 <= registers <= self.config.registers:
            raise ValueError(f"{self.keys.quants} must have 1 to {self.config.registers} registers, got {registers}")
        keep = [int(k) for k in self._read(data_dict, self.keys.keep, count, registers)]
        if min(keep) < 0:
            raise ValueError(f"{self.keys.keep} must be at least 0, got {keep}")
        prefix = [int(k) for k in self._read(data_dict, self.keys.prefix, count, 0)]
        codes = torch.cat([q.reshape(-1, dims) for q in quants]).to(self.tokenizer.dtype)
        return codes, [min(k, registers) for k in keep], prefix, registers

    def _read(self, data_dict, key: str | None, count: int, default) -> list:
        if key is None or key not in data_dict:
            return [default] * count
        values = list(data_dict[key])
        if len(values) < count:
            raise ValueError(f"{key} must hold one value a sample ({count}), got {len(values)}")
        return values[:count]

    def _samples(self, name: str, given) -> list[torch.Tensor]:
        # [1, C, T, H, W] or [1, C, H, W] each -> [C, T, H, W]
        channels, patch, out = self.config.channels, self.config.patch, []
        for x in given:
            sample = x[0] if x.dim() == 5 else x.transpose(0, 1)
            whole = x.dim() in (4, 5) and not any(n % p for n, p in zip(sample.shape[1:], patch, strict=True))
            if not whole or x.shape[0] != 1 or x.shape[1] != channels or 0 in x.shape:
                raise ValueError(
                    f"{name} must be [1, {channels}, ...] a sample, whole patches of {list(patch)}, got {list(x.shape)}"
                )
            if x.device != self.tokenizer.device:
                raise ValueError(f"{name} must be on {self.tokenizer.device}, got {x.device}")
            out.append(sample)
        return out

    @staticmethod
    def _check_mode(module: nn.Module) -> None:
        if module.training:
            raise RuntimeError(
                "an accelerated tokenizer only infers: call eval(), or flexkernels.restore() to train it"
            )


def _no_autocast(latents: list[torch.Tensor]):
    return torch.autocast(latents[0].device.type, enabled=False)
