"""A model as a folder or a repository of the Hugging Face hub: config.json, model.safetensors and a card of facts.

``model`` is a :class:`vft.Tokenizer` throughout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile

import torch

from .checkpoint import CODEC_PREFIX, published_name, write_tensors
from .files import check_folder, replacing

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def save_folder(
    model, folder: str | os.PathLike, dtype: torch.dtype | None, data: str | None, evaluation: dict | None
) -> None:
    """See :meth:`vft.Tokenizer.save_pretrained`."""
    folder = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    guidance = model.guidance and {"type": type(model.guidance).__name__, **dataclasses.asdict(model.guidance)}
    config = model.config.raw | {"sampler": {"steps": model.steps, "guidance": guidance}}
    tensors = {published_name(name, model.config): p for name, p in model.named_parameters()}
    tensors |= {CODEC_PREFIX + name: t for name, t in (model.codec_state or {}).items()}
    text = card(model, data, evaluation)
    # the weights last: without them the folder is refused as a whole
    for name, content in ((CARD, text), (CONFIG, json.dumps(config, indent=1) + "\n")):
        with replacing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    write_tensors(folder / WEIGHTS, tensors, {}, dtype)


def push(model, repo: str, private: bool, **options) -> str:
    """See :meth:`vft.Tokenizer.push_to_hub`."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("push_to_hub needs huggingface_hub: pip install 'flexkernels[hub]'") from error
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        api = HfApi()
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a vft tokenizer"))


def card(model, data: str | None, evaluation: dict | None) -> str:
    """A model card in Markdown: what the model itself says, the data as told, and results of ``vft eval``."""
    config = model.config
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "registers a latent frame": model.registers,
        "FSQ levels": f"{', '.join(map(str, config.levels))} ({config.codebook_size:,} ids)",
        "chunk": f"{config.chunk_size} frames",
        "working size": f"{model.size} x {model.size} pixels" if model.size else "any",
        "latent codec": config.codec,
        "sampler": f"{model.steps} steps, guidance {model.guidance}",
        "training data": data or "not stated",
    }
    lines = ["---", "library_name: flexkernels", "tags: [video-tokenizer]", "---", "", f"# {model.name}", ""]
    lines += ["A video tokenizer whose every token prefix is a valid, coarser video.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += [
        "",
        "    vft encode in.mp4 -o in.vft --model REPO_OR_FOLDER",
        "    vft decode in.vft -o out.mp4 -k 8 --model REPO_OR_FOLDER",
        "",
    ]
    if evaluation:
        rows = evaluation["rate_distortion"]["held-out clips"]
        names = list(next(iter(rows.values())))
        lines += [f"`vft eval`, {evaluation['clips']} held-out procedural clips, {evaluation['steps']} steps:", ""]
        lines += [f"| k | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
        lines += [f"| {k} | {' | '.join(f'{row[name]:g}' for name in names)} |" for k, row in rows.items()]
        lines += [""]
    return "\n".join(lines)
