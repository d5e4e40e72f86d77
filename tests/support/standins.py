"""Models with the class names, attributes and weights of published ones, but none of their computation.

What an accelerated stand-in gives can so be compared with what the published code gave (tests/data), without that code.
"""

import json
import math
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from paths import GENERATORS, TOKENIZERS
from safetensors.torch import load_file
from torch import nn


def published_class(target: str, base: type = nn.Module, **members) -> type:
    """One class for each target, which stands where pickle looks for it."""
    package, _, name = target.rpartition(".")
    module = sys.modules.setdefault(f"standin.{package}", ModuleType(f"standin.{package}"))
    if not hasattr(module, name):
        setattr(module, name, type(name, (base,), {"__module__": package, **members}))
    return getattr(module, name)


@contextmanager
def importable():
    """The classes of stand-ins can be imported by their published names."""
    modules = {name.removeprefix("standin."): m for name, m in sys.modules.items() if name.startswith("standin.")}
    # import looks at the outermost package
    modules |= {top: ModuleType(top) for top in {name.partition(".")[0] for name in modules}}
    with mock.patch.dict(sys.modules, modules):
        yield


def linear(*sizes: int) -> nn.Linear:
    return nn.Linear(*sizes, bias=False)


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def block(dim: int, head_dim: int, mlp_ratio: float, expansion: int | None) -> nn.Module:
    made, attn, mlp = nn.Module(), nn.Module(), nn.Module()
    made.dim, made.norm1, made.norm2, made.attn, made.mlp = dim, norm(dim), norm(dim), attn, mlp
    attn.head_dim, attn.scale, attn.q_norm, attn.k_norm = head_dim, 8 / head_dim, norm(head_dim), norm(head_dim)
    attn.wq, attn.wk, attn.wv, attn.proj = (linear(dim, dim) for _ in range(4))
    hidden = int(2 * int(dim * mlp_ratio) / 3)
    mlp.act, mlp.fc1, mlp.fc2, mlp.fc3 = nn.SiLU(), linear(dim, hidden), linear(hidden, dim), linear(dim, hidden)
    if expansion is not None:
        made.adaLN_expansion = expansion
        made.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * expansion * dim))
    return made


def _head(m, e) -> None:
    m.dim_in, m.dim_out = e["dim"], e.get("dim_out") or e["channels_out"] * math.prod(e["patch_sizes"])
    m.norm, m.proj = norm(m.dim_in), nn.Linear(m.dim_in, m.dim_out)
    if "adaLN_emb_read_key" in e:
        m.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(m.dim_in, 2 * m.dim_in))


def _patches(m, e) -> None:
    m.dim_in, m.dim_out = e["channels_in"], e["dim"]
    m.patch_proj = nn.Linear(m.dim_in * math.prod(e["patch_sizes"]), m.dim_out)


def _code_embed(m, e) -> None:
    m.dim_out, m.proj = e["dim"], nn.Linear(e["dim_in"], e["dim"])


def _registers(m, e) -> None:
    m.n_eval, m.ordering_mode, m.registers = e["n_max"], "nested", parameter(e["t_max"], e["n_max"], e["dim"])


def _packer(m, e) -> None:
    m.cross_timestep_attention_config = e.get("cross_timestep_attention_config")


def _transformer(m, e) -> None:
    m.rope_forward_read_key = m.score_mod_read_key = None
    sizes = e["dim"], e["head_dim"], e["mlp_ratio"], e.get("adaLN_expansion")
    m.blocks = nn.ModuleList(block(*sizes) for _ in range(e["depth"]))


def _times(m, e) -> None:
    m.temb_as_tokens = False
    m.mlp = nn.Sequential(nn.Linear(e["frequency_embedding_size"], e["dim"]), nn.SiLU(), nn.Linear(e["dim"], e["dim"]))


def _mask_token(m, e) -> None:
    m.dropout_mask_token = parameter(e["dim"])


def _null(m, e) -> None:
    m.nullcond, m.replace_with_single_token = parameter(e["dim"]), False


def _operation(m, e) -> None:
    m.per_sample_op = SimpleNamespace(__name__=e["per_sample_op"]["_target_"].rpartition(".")[2])


def _positions(m, e) -> None:
    m.posembs = parameter(len(e["max_sizes"]), 1, e["dim"], e["max_sizes"][0])


FILL = {
    "PatchEmbedder": _patches, "PositionalEmbeddingAdder": _positions, "RegistersTemporal2D": _registers,
    "BlockWiseSequenceInterleavePacker": _packer, "FlexTransformer": _transformer, "LinearHead": _head,
    "ToPatchesLinearHead": _head, "LinearLayer": _code_embed, "MaskedNestedDropout": _mask_token,
    "MaskedPrefixDropout": _mask_token, "LearnedNullCond": _null, "TimestepEmbedder": _times,
    "PerSampleOp": _operation, "SequenceInterleavedUnpacker": lambda m, e: None,
}  # fmt: skip


def module(entry: dict) -> nn.Module:
    made = published_class(entry["_target_"])()
    for name, value in entry.items():
        setattr(made, name, value)
    FILL[type(made).__name__](made, entry)
    return made


class Refusing:
    """The published loop, which the stand-ins do not have."""

    def __call__(self, *arguments, **options):
        raise NotImplementedError("the published loop")


def side(entry: dict) -> nn.Module:
    made = published_class(entry["_target_"], device=property(lambda m: next(m.parameters()).device))()
    made.module_dict = nn.ModuleDict({name: module(e) for name, e in entry["module_dict"].items()})
    return made


def tokenizer(case: str) -> nn.Module:
    """A VideoFlexTok of a golden configuration and its weights."""
    config = json.loads((TOKENIZERS / case / "config.json").read_text())["video_flex_tok"]
    model = published_class(config["_target_"])()
    model.encoder, model.decoder = side(config["encoder"]), side(config["decoder"])
    model.regularizer = published_class(config["regularizer"]["_target_"], forward_z=lambda m, z: None)()
    model.regularizer._levels = torch.tensor(config["regularizer"]["levels"])
    model.load_state_dict(load_file(TOKENIZERS / "weights.safetensors"))
    fields = {"noise_read_key": None, "zero_noise": False, "cond_vae_latents_key": None} | config["pipeline"]
    model.pipeline = published_class(fields["_target_"], Refusing)()
    vars(model.pipeline).update(fields, model=model.decoder)
    return model.eval()


def generator(case: str) -> nn.Module:
    """A SemanTokAR of a golden configuration and its weights."""
    config = json.loads((GENERATORS / case / "config.json").read_text())
    weights = load_file(GENERATORS / case / "model.safetensors")
    model = published_class("semantok.ar.SemanTokAR", sample=lambda m: None)()
    model.cls_emb = model.ctx_in = model.ctx_null = None
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        at = model
        for part in owner.split(".") if owner else ():
            if part not in at._modules:
                setattr(at, part, nn.Module())
            at = at._modules[part]
        setattr(at, leaf, nn.Parameter(weight.clone()))
        at.eps, at.bias = 1e-6, None
    model.blocks = nn.ModuleList(model.blocks.children())
    for each in model.blocks:
        each.attn.hd, each.xattn = 64, getattr(each, "xattn", None)
    model.tok_emb.num_embeddings = config["vocab"]
    if config["cond"] == "class":
        model.cls_emb.num_embeddings = config["n_classes"] + 1
    else:
        model.ctx_in.in_features = config["ctx_dim"]
    return model.eval()
