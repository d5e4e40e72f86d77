"""The models' configurations, read from the published schemas.

A published config is a tree of ``_target_`` entries (VideoFlexTok release). Only the targets and fields listed here are
read; nothing a file names is ever imported or called. See :func:`parse_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from flexkernels import SequenceLayout

from .schema import ROOT, SKIPPED, ConfigError, check_tree, field_of, kind_of, target_of
from .wiring import PATCHES, follow


@dataclass(frozen=True)
class PosEmb:
    """A positional embedding over ``len(sizes)`` axes: kind ``learnable_sum``, ``learnable_prod`` or ``sincos``."""

    kind: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Trunk:
    """A transformer: ``mask`` and ``cross_frame`` are those of :class:`flexkernels.SequenceLayout`."""

    width: int
    depth: int
    head_dim: int
    mlp_ratio: float
    mask: str
    cross_frame: tuple[tuple[str, str], ...] | None
    patch_posemb: PosEmb | None
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def mlp_width(self) -> int:
        return int(2 * int(self.width * self.mlp_ratio) / 3)


@dataclass(frozen=True)
class Head:
    """A linear layer after a LayerNorm; ``modulated``: with a shift and scale from the time step, by a linear layer."""

    bias: bool = True
    modulated: bool = False
    modulation_bias: bool = True


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything the tokenizer computes with; sizes in tokens or latent pixels, chunk sizes in video frames.

    ``register_ops`` is the order of what happens to the decoder's registers: among ``posemb``, ``keep``, ``prefix``,
    ``null``. ``register_table`` registers are stored, of which the first ``registers`` are used. ``names`` maps our
    parameter prefixes to the checkpoint's, ``ignored`` are checkpoint prefixes of training-only heads, ``raw`` is the
    config as it was read, for saving.
    """

    channels: int
    patch: tuple[int, int, int]
    encoder: Trunk
    decoder: Trunk
    registers: int
    register_table: int
    max_frames: int
    register_ops: tuple[str, ...]
    register_posemb: PosEmb | None
    levels: tuple[int, ...]
    max_timestep: float
    time_frequencies: int
    code_bias: bool
    encoder_head: Head
    decoder_head: Head
    codec: str
    chunk_size: int
    overlap: int
    size: int | None
    names: dict[str, str] = field(repr=False)
    ignored: tuple[str, ...] = field(repr=False, default=())
    raw: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def codebook_size(self) -> int:
        size = 1
        for levels in self.levels:
            size *= levels
        return size


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of the autoregressive transformer; ``tokenizer`` names what made the tokens that it was trained on, and
    ``fingerprint`` its weights; ``frames`` are the latent frames of the longest clip of training, 0 where that is not
    stated; ``raw`` is the config as it was read, for saving.
    """

    depth: int
    vocab: int
    seq_len: int
    cond: str
    n_classes: int = 0
    ctx_dim: int = 0
    n_ctx_null: int = 0
    head_bias: bool = False
    classes: tuple[str, ...] = ()
    tokenizer: str | None = None
    fingerprint: str | None = None
    frames: int = 0
    raw: dict[str, Any] = field(repr=False, default_factory=dict)

    head_dim = 64

    @property
    def trained_frames(self) -> int:
        """Latent frames of a clip of training: where not stated, those of one published chunk, 17 frames."""
        return self.frames or min(5, self.seq_len)

    def tokens_per_frame(self, frames: int) -> int:
        """Of so many latent frames as fit into ``seq_len``, but no more than a frame had in training."""
        return max(1, self.seq_len // max(frames, self.trained_frames))

    @property
    def heads(self) -> int:
        return self.depth

    @property
    def width(self) -> int:
        return self.head_dim * self.depth

    @property
    def hidden(self) -> int:
        return -(-int(8 * self.width / 3) // 64) * 64


def parse_generator_config(raw: dict[str, Any]) -> GeneratorConfig:
    """A generator's ``config.json``. Raises ConfigError naming the field that is missing, unknown or wrong."""
    names = {f.name for f in fields(GeneratorConfig)} - {"raw"}
    for key in ("depth", "vocab", "seq_len", "cond"):
        field_of(raw, key, "the generator's config")
    for key in sorted(raw.keys() - names):
        raise ConfigError(f"the generator's config has the unknown field {key!r}")
    cond = raw["cond"]
    if cond not in ("class", "text"):
        raise ConfigError(f"cond must be 'class' or 'text', got {cond!r}")
    needed = ("n_classes",) if cond == "class" else ("ctx_dim", "n_ctx_null")
    for key in ("depth", "vocab", "seq_len", "n_classes", "ctx_dim", "n_ctx_null", "frames"):
        value, low = raw.get(key, 0), 1 if key in ("depth", "vocab", "seq_len", *needed) else 0
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise ConfigError(f"{key} must be an int of at least {low}, got {value!r}")
    if not isinstance(raw.get("head_bias", False), bool):
        raise ConfigError(f"head_bias must be true or false, got {raw['head_bias']!r}")
    for key in ("tokenizer", "fingerprint"):
        if not isinstance(raw.get(key), (str, type(None))):
            raise ConfigError(f"{key} must be a string, got {raw[key]!r}")
    classes = raw.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ConfigError(f"classes must be a list of names, got {classes!r}")
    if classes and len(classes) != raw.get("n_classes", 0):
        raise ConfigError(f"classes must hold n_classes = {raw.get('n_classes', 0)} names, got {len(classes)}")
    return GeneratorConfig(**{**raw, "classes": tuple(classes)}, raw=dict(raw))


_MASKS = {
    "full": "full",
    "causal": "causal",
    "time_block_causal": "frame_causal",
    "time_block_causal_last": "frame_causal_prefix",
    "flexible_time_block_causal_last": "frame_causal_prefix",
}


def parse_config(raw: dict[str, Any]) -> TokenizerConfig:
    """Reads a published config: the tree itself, or the wrapper with ``video_flex_tok``/``video_tokenizer`` in it.

    Raises ConfigError naming the entry for an unknown target, an unknown or missing field, or an unsupported value.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"config must be a mapping, got {type(raw).__name__}")
    try:
        return _parse(raw)
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"config lacks the field {error}") from error
    except (AttributeError, TypeError, ValueError, OverflowError, IndexError) as error:
        raise ConfigError(f"config has a value of the wrong type: {error}") from error


def _parse(raw: dict[str, Any]) -> TokenizerConfig:
    model = next((raw[k] for k in ("video_flex_tok", "video_tokenizer") if k in raw), raw)
    check_tree(model, "config")
    if target_of(model, "config") != "wrappers.VideoFlexTok":
        raise ConfigError(f"config must describe a VideoFlexTok model, got _target_ {model.get('_target_')!r}")
    encoder = field_of(field_of(model, "encoder", "config"), "module_dict", "config.encoder")
    decoder = field_of(field_of(model, "decoder", "config"), "module_dict", "config.decoder")
    names: dict[str, str] = {}
    parts = _read_encoder(encoder, names) | _read_decoder(decoder, names)
    fsq = field_of(model, "regularizer", "config")
    levels = tuple(int(n) for n in field_of(fsq, "levels", "config.regularizer"))
    if len(levels) != parts.pop("code_dim"):
        raise ConfigError(f"config.regularizer.levels must match the encoder head's outputs, got {list(levels)}")
    channels = parts["channels"]
    chunk_size, overlap = int(raw.get("chunk_size", 17)), int(raw.get("overlap_size_frames", 1))
    preprocess = raw.get("video_preprocess_args") or {}
    return TokenizerConfig(
        **parts,
        levels=levels,
        codec=str(model.get("vae", {}).get("tokenizer_id", f"latents_{channels}")),
        chunk_size=chunk_size,
        overlap=overlap,
        size=preprocess.get("size"),
        names=names,
        ignored=tuple(f"{side}.module_dict.{n}." for side, m in (("encoder", encoder), ("decoder", decoder))
                      for n, e in m.items() if target_of(e, n) in SKIPPED),
        raw=raw,
    )  # fmt: skip


def _read_encoder(modules: dict, names: dict) -> dict[str, Any]:
    where = "encoder"
    found = _Roles(modules, where)
    patch, registers, head = (found.one(kind) for kind in ("PatchEmbedder", "RegistersTemporal2D", "LinearHead"))
    found.trunk()
    posemb = _patch_posemb(where, modules, follow(where, modules))
    trunk = _read_trunk(found, posemb)
    width = trunk.width
    for entry in (patch, registers, posemb, head):
        if entry and entry[1]["dim"] != width:
            raise ConfigError(f"{where}.{entry[0]}.dim must be the transformer's {width}, got {entry[1]['dim']}")
    names |= {
        "encoder.patch_embed": f"encoder.module_dict.{patch[0]}.patch_proj",
        "encoder.registers": f"encoder.module_dict.{registers[0]}.registers",
        "encoder.blocks": f"encoder.module_dict.{found.one('FlexTransformer')[0]}.blocks",
        "encoder.head": f"encoder.module_dict.{head[0]}.proj",
    }
    if posemb:
        names["encoder.patch_posemb.table"] = f"encoder.module_dict.{posemb[0]}.posembs"
    used, stored = int(registers[1].get("n_eval") or registers[1]["n_max"]), int(registers[1]["n_max"])
    if used > stored:
        raise ConfigError(f"{where}.{registers[0]}.n_eval must be at most n_max {stored}, got {used}")
    return {
        "encoder": trunk,
        "channels": int(patch[1]["channels_in"]),
        "patch": tuple(int(p) for p in patch[1]["patch_sizes"]),
        "registers": used,
        "register_table": stored,
        "max_frames": int(registers[1]["t_max"]),
        "code_dim": int(head[1]["dim_out"]),
        "encoder_head": Head(bias=bool(head[1].get("proj_bias", True))),
    }


def _patch_posemb(side: str, modules: dict, added: dict[str, str]) -> tuple[str, dict] | None:
    found = [(name, modules[name]) for name, what in added.items() if what == PATCHES]
    if len(found) > 1:
        raise ConfigError(f"{side} must add positions to patches once, got {', '.join(name for name, _ in found)}")
    return found[0] if found else None


_REGISTER_OPS = {
    "PositionalEmbeddingAdder": ("posemb", "decoder.register_posemb.table", "posembs"),
    "MaskedNestedDropout": ("keep", "decoder.mask_token", "dropout_mask_token"),
    "MaskedPrefixDropout": ("prefix", "decoder.prefix_token", "dropout_mask_token"),
    "LearnedNullCond": ("null", "decoder.null_token", "nullcond"),
}


def _read_decoder(modules: dict, names: dict) -> dict[str, Any]:
    found = _Roles(modules, "decoder")
    embed, patch, head = found.one("LinearLayer"), found.one("PatchEmbedder"), found.one("ToPatchesLinearHead")
    times, ops, register_posemb = found.one("TimestepEmbedder"), [], None
    found.trunk()
    added = follow("decoder", modules)
    patch_posemb = _patch_posemb("decoder", modules, added)
    for name, entry in modules.items():
        kind = kind_of(entry, name)
        if kind not in _REGISTER_OPS or added.get(name) == PATCHES:
            continue
        op, ours, theirs = _REGISTER_OPS[kind]
        if op in ops:
            raise ConfigError(f"decoder.{name}: a second {kind} on the registers is not supported")
        ops.append(op)
        names[ours] = f"decoder.module_dict.{name}.{theirs}"
        if op == "posemb":
            register_posemb = _posemb(entry)
    trunk = _read_trunk(found, patch_posemb)
    if found.one("FlexTransformer")[1].get("adaLN_expansion", 1) != 2:
        raise ConfigError("decoder transformer's adaLN_expansion must be 2 (patches and registers)")
    prefix = "decoder.module_dict"
    names |= {
        "decoder.code_embed": f"{prefix}.{embed[0]}.proj",
        "decoder.patch_embed": f"{prefix}.{patch[0]}.patch_proj",
        "decoder.time_embed": f"{prefix}.{times[0]}.mlp",
        "decoder.blocks": f"{prefix}.{found.one('FlexTransformer')[0]}.blocks",
        "decoder.head": f"{prefix}.{head[0]}.proj",
    }
    decoder_head = _modulated_head(found, head[1])
    if decoder_head.modulated:
        names["decoder.head_modulation"] = f"{prefix}.{head[0]}.adaLN_modulation.1"
    if patch_posemb:
        names["decoder.patch_posemb.table"] = f"{prefix}.{patch_posemb[0]}.posembs"
    return {
        "decoder": trunk,
        "register_ops": tuple(ops),
        "register_posemb": register_posemb,
        "max_timestep": float(times[1].get("max_timestep", 1000.0)),
        "time_frequencies": int(times[1].get("frequency_embedding_size", 256)),
        "code_bias": bool(embed[1].get("proj_bias", True)),
        "decoder_head": decoder_head,
    }


def _modulated_head(found: _Roles, entry: dict) -> Head:
    # a config that names no wiring has the one that this package makes, with modulation
    wired = "input_list_read_keys" in found.one("BlockWiseSequenceInterleavePacker")[1]
    modulated = entry.get("adaLN_emb_read_key", None if wired else "time") is not None
    return Head(bool(entry.get("proj_bias", True)), modulated, bool(entry.get("adaLN_bias", True)))


def _read_trunk(found: _Roles, posemb) -> Trunk:
    (name, entry), (packer_name, packer) = found.trunk()
    mode = packer.get("mask_mode")
    if mode not in _MASKS:
        raise ConfigError(f"{packer_name}.mask_mode must be one of {', '.join(_MASKS)}, got {mode!r}")
    switches = packer.get("cross_timestep_attention_config")
    if switches is not None and mode != "flexible_time_block_causal_last":
        raise ConfigError(f"{packer_name}.cross_timestep_attention_config needs flexible_time_block_causal_last")
    cross = tuple((k.replace("nonprefix", "register").replace("2", "_to_"), v) for k, v in (switches or {}).items())
    try:
        SequenceLayout([[(1, 1)]], _MASKS[mode], dict(cross))
    except ValueError as error:
        raise ConfigError(f"{packer_name}.cross_timestep_attention_config: {error}") from error
    width, head_dim = int(entry["dim"]), int(entry.get("head_dim", 64))
    if width % head_dim:
        raise ConfigError(f"{name}.dim must be a multiple of head_dim {head_dim}, got {width}")
    return Trunk(
        width=width,
        depth=int(entry["depth"]),
        head_dim=head_dim,
        mlp_ratio=float(entry.get("mlp_ratio", 4.0)),
        mask=_MASKS[mode],
        cross_frame=cross or None,
        patch_posemb=_posemb(posemb[1]) if posemb else None,
        qkv_bias=bool(entry.get("qkv_bias", False)),
        proj_bias=bool(entry.get("proj_bias", False)),
        mlp_bias=bool(entry.get("mlp_bias", False)),
    )


def _posemb(entry: dict) -> PosEmb:
    kind = entry.get("posemb_type", "sincos")
    if kind not in ("learnable_sum", "learnable_prod", "sincos"):
        raise ConfigError(f"posemb_type must be learnable_sum, learnable_prod or sincos, got {kind!r}")
    sizes = tuple(int(n) for n in entry["max_sizes"])
    if kind != "sincos" and len(set(sizes)) > 1:
        raise ConfigError(f"max_sizes must be equal for {kind}, got {list(sizes)}")
    return PosEmb(kind, sizes)


class _Roles:
    """Looks modules up by the last part of their target."""

    def __init__(self, modules: dict, where: str) -> None:
        self.where = where
        self.by_kind: dict[str, list[tuple[str, dict]]] = {}
        for name, entry in modules.items():
            self.by_kind.setdefault(kind_of(entry, name), []).append((name, entry))

    def optional(self, kind: str):
        entries = self.by_kind.get(kind, [])
        if len(entries) > 1:
            raise ConfigError(f"{self.where} must have one {kind}, got {', '.join(n for n, _ in entries)}")
        return entries[0] if entries else None

    def trunk(self) -> tuple[tuple[str, dict], tuple[str, dict]]:
        return self.one("FlexTransformer"), self.one("BlockWiseSequenceInterleavePacker")

    def one(self, kind: str) -> tuple[str, dict]:
        entry = self.optional(kind)
        if entry is None:
            raise ConfigError(f"{self.where} must have a {kind}, got none")
        return entry


def make_config(
    *,
    channels: int = 16,
    patch: tuple[int, int, int] = (1, 2, 2),
    encoder_width: int = 128,
    encoder_depth: int = 2,
    decoder_width: int = 192,
    decoder_depth: int = 2,
    head_dim: int = 64,
    registers: int = 16,
    grid: int = 8,
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
    codec: str = "vidtok_kl_causal_488_16chn",
    size: int | None = None,
) -> dict[str, Any]:
    """A config tree in the published schema for a new model: causal encoder, frame-causal decoder, as released.

    ``grid`` is the largest number of latent frames and of patches along each side; ``size`` the working video size.
    """
    target = lambda name, **fields: {"_target_": ROOT + name, **fields}  # noqa: E731
    posemb = lambda key, dim, sizes: target(  # noqa: E731
        "model.utils.posembs.PositionalEmbeddingAdder", read_key=key, write_key=key, dim=dim, max_sizes=sizes,
        posemb_type="learnable_sum", posemb_scaling="absolute",
    )  # fmt: skip
    packer = lambda mask: target(  # noqa: E731
        "model.preprocessors.flex_seq_packing.BlockWiseSequenceInterleavePacker", mask_mode=mask
    )
    patches = lambda dim: target(  # noqa: E731
        "model.preprocessors.patching.PatchEmbedder", patch_sizes=list(patch), channels_in=channels, dim=dim
    )
    trunk = lambda dim, depth, **more: target(  # noqa: E731
        "model.trunks.transformers.FlexTransformer", dim=dim, depth=depth, head_dim=head_dim, mlp_ratio=4.0, **more
    )
    sides = [grid, grid, grid]
    grid_registers = max(grid, registers)
    e, d, quants = encoder_width, decoder_width, "dec_quants"
    encoder = {
        "enc_patch_emb": patches(e),
        "enc_posemb_module": posemb("enc_patches", e, sides),
        "enc_register_module": target(
            "model.preprocessors.registers.RegistersTemporal2D", dim=e, t_max=grid, n_min=1, n_max=registers
        ),
        "enc_seq_packer": packer("time_block_causal_last"),
        "enc_transformer": trunk(e, encoder_depth),
        "enc_to_latents": target("model.postprocessors.heads.LinearHead", dim=e, dim_out=len(levels)),
    }
    decoder = {
        "dec_from_latents": target(
            "model.preprocessors.linear.LinearLayer", write_key=quants, dim_in=len(levels), dim=d
        ),
        "dec_registers_posemb_module": posemb(quants, d, [grid_registers, grid_registers]),
        "dec_nested_dropout": target(
            "model.preprocessors.token_dropout.MaskedNestedDropout", read_write_key=quants, dim=d
        ),
        "dec_prefix_masking": target(
            "model.preprocessors.token_dropout.MaskedPrefixDropout", read_write_key=quants, dim=d
        ),
        "dec_latent_dropout": target("model.preprocessors.nullcond.LearnedNullCond", read_write_key=quants, dim=d),
        "dec_noise_patch_emb": patches(d),
        "dec_patches_posemb_module": posemb("dec_patches", d, sides),
        "dec_seq_packer": packer("time_block_causal"),
        "dec_time_embedder": target("model.preprocessors.time_embedding.TimestepEmbedder", dim=d, max_timestep=1.0),
        "dec_transformer": trunk(d, decoder_depth, adaLN_expansion=2),
        "dec_to_patches": target(
            "model.postprocessors.heads.ToPatchesLinearHead", dim=d, channels_out=channels, patch_sizes=list(patch)
        ),
    }
    wrap = lambda modules: target("model.utils.wrappers.SequentialModuleDictWrapper", module_dict=modules)  # noqa: E731
    return {
        "video_flex_tok": target(
            "wrappers.VideoFlexTok",
            vae=target("compressors.vidtok.VidTokVAE", tokenizer_id=codec),
            encoder=wrap(encoder),
            decoder=wrap(decoder),
            regularizer=target("regularizers.quantize_fsq.FSQ", levels=list(levels)),
        ),
        "chunk_size": 17,
        "overlap_size_frames": 1,
        "video_preprocess_args": {"size": size, "chunk_size": 17, "overlap_size_frames": 1},
    }
