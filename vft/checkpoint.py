"""Checkpoints in and out: a directory, one safetensors file, a hub repository, or an embedded model.

A checkpoint is a config (the published schema, see config.py) and tensors under the published names. Nothing is ever
unpickled, and nothing a file names is imported or called.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from .config import TokenizerConfig
from .files import replacing
from .state_dict import published_names

ASSETS = Path(__file__).parent / "assets"
# what the file names of embedded generators end in
GENERATOR = "_generator"
CODEC_PREFIX = "vae."
_MAX_CONFIG = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit its config; the message names the file or the key."""


def read(reference: str | os.PathLike, suffix: str = "") -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """Config, tensors and a short name.

    ``reference`` is the name of an embedded model (``"tiny"``), a directory, a single safetensors file, or a hub id
    ``"[hf://]org/repo[@revision][/subdirectory]"``. A directory holds a ``config.json`` beside one ``*.safetensors`` of
    any name or the shards of one ``*.safetensors.index.json``, or is the folder of a ``vft train`` run. A file carries
    its config as metadata, or lies beside a ``config.json``. Names lose what wrappers add, see :mod:`vft.state_dict`.
    ``suffix`` ends the file names of embedded models of another kind than the tokenizer: ``GENERATOR``.

    Raises:
        CheckpointError: missing, empty, damaged or incomplete files.
        ImportError: a hub id without the ``hub`` extra.
    """
    text = os.fspath(reference).removeprefix("hf://")
    path = Path(text)
    if path.is_dir():
        return *_unwrapped(*_read_directory(path), path), path.resolve().name
    if path.is_file():
        return *_unwrapped(*_read_file(path), path), path.stem
    embedded = ASSETS / f"{text}{suffix}.safetensors"
    if text.isidentifier() and embedded.is_file():
        return *_read_file(embedded), text
    if text.count("/") >= 1 and not text.startswith((".", "/", "~")) and not text.endswith(".safetensors"):
        return *_unwrapped(*_read_directory(_download(text)), path), text
    raise CheckpointError(
        f"model {text!r} must be an embedded model ({', '.join(embedded_models(suffix)) or 'none'}), a directory, "
        "a .safetensors file, or a hub id org/repo[@revision][/subdirectory]"
    )


def embedded_models(suffix: str = "") -> list[str]:
    """Names of the models of one kind shipped in the package."""
    stems = {p.stem for p in ASSETS.glob("*.safetensors") if p.stem != "codec" and not p.stem.startswith("lapped")}
    generators = {stem for stem in stems if stem.endswith(GENERATOR)}
    return sorted(stem.removesuffix(suffix) for stem in (generators if suffix else stems - generators))


def _unwrapped(config: dict, tensors: dict, path: Path) -> tuple[dict, dict]:
    try:
        return config, {name: tensors[key] for name, key in published_names(tensors).items()}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_directory(path: Path) -> tuple[dict, dict]:
    weights = sorted(path.glob("*.safetensors"))
    config_file, indices = path / "config.json", sorted(path.glob("*.safetensors.index.json"))
    preferred = [w for w in weights if w.name == "model.safetensors"] or weights
    if not config_file.is_file():
        # the folder of a training run
        if [w.name for w in preferred] == ["model.safetensors"]:
            return _read_file(preferred[0])
        if (path / "state.safetensors").is_file():
            raise CheckpointError(f"{path} must hold a model.safetensors, got a training run that has not written one")
        raise CheckpointError(f"{path} must hold a config.json")
    if len(indices) > 1 or (not indices and len(preferred) != 1):
        found = [f.name for f in indices or weights]
        raise CheckpointError(f"{path} must hold one model.safetensors or one *.safetensors.index.json, got {found}")
    tensors = _read_shards(indices[0]) if indices else _read_tensors(preferred[0])[0]
    return _parse_json(config_file), tensors


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files that an index names."""
    files = _parse_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise CheckpointError(f"{index} must hold a weight_map from names to files beside it")
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(files.values())):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} must hold the shard {name} that {index.name} names")
        tensors |= _read_tensors(index.parent / name)[0]
    for key in sorted(files.keys() - tensors.keys()):
        raise CheckpointError(f"{files[key]} must hold {key}, as {index.name} says")
    return {key: tensors[key] for key in files}


def _parse_json(path: Path) -> dict:
    try:
        config = json.loads(path.read_bytes()[:_MAX_CONFIG])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(config).__name__}")
    return config


def _read_file(path: Path) -> tuple[dict, dict]:
    tensors, metadata = _read_tensors(path)
    # other programs state the framework alone
    if metadata.keys() <= {"format"}:
        if (path.parent / "config.json").is_file():
            return _parse_json(path.parent / "config.json"), tensors
        raise CheckpointError(f"{path} must carry its config as metadata, or lie in a directory beside a config.json")
    return {key: _parse_literal(value) for key, value in metadata.items()}, tensors


def _parse_literal(text: str) -> Any:
    """A metadata string: JSON, else a Python literal, else the string itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text[:_MAX_CONFIG])
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} must be a complete safetensors file: {error}") from error


def _download(reference: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ImportError(f"model {reference!r} needs huggingface_hub: pip install 'flexkernels[hub]'") from error
    organisation, name, *subdirectory = reference.split("/")
    name, _, revision = name.partition("@")
    folder = "/".join(subdirectory)
    names = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
    wanted = [f"{folder}/{name}" if folder else name for name in names]
    try:
        root = snapshot_download(f"{organisation}/{name}", revision=revision or None, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model {reference!r} could not be had from the hub: {str(error).splitlines()[0]}"
        ) from error
    return Path(root) / folder


def load_weights(
    model: torch.nn.Module, config: TokenizerConfig, tensors: dict[str, torch.Tensor], check_finite: bool = True
) -> dict:
    """Copies tensors under published names into the model; returns the latent codec's, without their prefix.

    Raises CheckpointError naming missing and surplus keys, wrong shapes and, with check_finite, NaN and infinity.
    """
    codec = {k.removeprefix(CODEC_PREFIX): v for k, v in tensors.items() if k.startswith(CODEC_PREFIX)}
    given = {k: v for k, v in tensors.items() if not k.startswith((CODEC_PREFIX, *config.ignored))}
    fill({published_name(name, config): p for name, p in model.named_parameters()}, given, check_finite)
    for key, value in codec.items() if check_finite else ():
        _check_finite(CODEC_PREFIX + key, value)
    return codec


def _check_finite(key: str, value: torch.Tensor) -> None:
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise CheckpointError(
            f"{key} must be finite, got NaN or infinity (check_finite=False or --unchecked-weights loads it)"
        )


def fill(wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor], check_finite: bool = True) -> None:
    """Copies each given tensor into the wanted one of its name.

    Raises CheckpointError naming missing and surplus keys, wrong shapes and, with check_finite, NaN and infinity.
    """
    for key in sorted(wanted.keys() - given.keys()):
        raise CheckpointError(
            f"the checkpoint lacks the key {key} ({len(wanted.keys() - given.keys())} missing in all)"
        )
    for key in sorted(given.keys() - wanted.keys()):
        raise CheckpointError(f"the checkpoint has the unknown key {key} ({len(given.keys() - wanted.keys())} in all)")
    with torch.no_grad():
        for key, parameter in wanted.items():
            if given[key].shape != parameter.shape:
                raise CheckpointError(f"{key} must have shape {list(parameter.shape)}, got {list(given[key].shape)}")
            if not given[key].is_floating_point():
                raise CheckpointError(f"{key} must be floating point, got {given[key].dtype}")
            if check_finite:
                _check_finite(key, given[key])
            parameter.copy_(given[key])


def published_name(name: str, config: TokenizerConfig) -> str:
    """The checkpoint's name of one of our parameters."""
    prefix = max((p for p in config.names if name == p or name.startswith(p + ".")), key=len)
    return config.names[prefix] + name[len(prefix) :]


def write(
    path: str | os.PathLike, model: torch.nn.Module, config: TokenizerConfig, extra: dict, dtype, codec: dict
) -> None:
    """Saves one safetensors file under published names, the config (and ``extra`` entries) as metadata, atomically.

    ``codec`` are the latent codec's weights, without their prefix.
    """
    tensors = {published_name(name, config): p for name, p in model.named_parameters()}
    tensors |= {CODEC_PREFIX + name: value for name, value in codec.items()}
    write_tensors(path, tensors, config.raw | extra, dtype)


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], config: dict, dtype=None) -> None:
    """Saves one safetensors file with the config as metadata, atomically.

    ``dtype`` becomes that of the floating-point tensors; None keeps each tensor's own.
    """
    stored = {
        name: t.detach().cpu().to(dtype if t.is_floating_point() else None).contiguous() for name, t in tensors.items()
    }
    with replacing(path) as temporary:
        temporary.write_bytes(serialize(stored, {key: json.dumps(value) for key, value in config.items()}))
