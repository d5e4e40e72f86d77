"""Small random checkpoints over the options of the published configuration, and what the published code computes.

``python tests/support/published_options.py`` writes the outputs anew, with FLEXKERNELS_VIDEOFLEXTOK naming a checkout.
"""

import json
from functools import cache

import published
import torch
from paths import TOKENIZERS
from safetensors.torch import load_file, save_file

import vft
from vft import checkpoint
from vft.config import parse_config

STORED = TOKENIZERS / "options.safetensors"
SHAPES = ((16, 3, 4, 4), (16, 1, 2, 6))
TIME, KEEP = 0.7, (3, 8)
# 8 registers in use
REGISTERS = 8
PATCH_POSITIONS = "enc_posemb_module", "dec_patches_posemb_module"


def _head(key, value):
    return lambda encoder, decoder: [
        head.update({key: value}) for head in (encoder["enc_to_latents"], decoder["dec_to_patches"])
    ]


def _trunks(**fields):
    return lambda encoder, decoder: [
        trunk.update(fields) for trunk in (encoder["enc_transformer"], decoder["dec_transformer"])
    ]


def _untimed_head(encoder, decoder):
    del decoder["dec_to_patches"]["adaLN_emb_read_key"]


def _mask(side, mode, switches=None):
    def change(encoder, decoder):
        packer = (encoder["enc_seq_packer"], decoder["dec_seq_packer"])[side]
        packer["mask_mode"] = mode
        if switches:
            keys = ("prefix2prefix", "prefix2nonprefix", "nonprefix2prefix", "nonprefix2nonprefix")
            packer["cross_timestep_attention_config"] = dict(zip(keys, switches, strict=True))

    return change


def _posembs(**fields):
    def change(encoder, decoder):
        for modules, name in zip((encoder, decoder), PATCH_POSITIONS, strict=True):
            modules[name].update(fields)

    return change


def _registers_sincos(encoder, decoder):
    decoder["dec_registers_posemb_module"].update(posemb_type="sincos", max_sizes=[8, 12])


def _drop(*names):
    def change(encoder, decoder):
        for name in names:
            (encoder if name in encoder else decoder).pop(name)

    return change


def _order(encoder, decoder):
    # positions after the masks
    moved = decoder.pop("dec_registers_posemb_module")
    entries = list(decoder.items())
    place = [name for name, _ in entries].index("dec_latent_dropout") + 1
    decoder.clear()
    decoder.update([*entries[:place], ("dec_registers_posemb_module", moved), *entries[place:]])


def _time(**fields):
    return lambda encoder, decoder: decoder["dec_time_embedder"].update(fields)


def _written_elsewhere(encoder, decoder):
    if "enc_posemb_module" in encoder:
        encoder["enc_posemb_module"]["write_key"] = "enc_placed"
        encoder["enc_seq_packer"]["input_list_read_keys"] = ["enc_placed", "enc_registers"]


def _same(encoder, decoder):
    pass


# every option with its values; a case takes one of each
OPTIONS = {
    "head time": (_same, _untimed_head),
    "head bias": (_same, _head("proj_bias", False)),
    "modulation bias": (_same, lambda e, d: d["dec_to_patches"].update(adaLN_bias=False)),
    "code bias": (_same, lambda e, d: d["dec_from_latents"].update(proj_bias=False)),
    "qkv bias": (_same, _trunks(qkv_bias=True)),
    "proj bias": (_same, _trunks(proj_bias=True)),
    "mlp bias": (_same, _trunks(mlp_bias=True)),
    "head_dim": (_same, _trunks(head_dim=32), _trunks(head_dim=16)),
    "mlp_ratio": (_same, _trunks(mlp_ratio=2.7), _trunks(mlp_ratio=1)),
    "encoder mask": (
        _same, _mask(0, "causal"), _mask(0, "full"),
        _mask(0, "flexible_time_block_causal_last", ("none", "full", "full", "causal")),
    ),
    "decoder mask": (
        _same, _mask(1, "full"), _mask(1, "time_block_causal_last"), _mask(1, "causal"),
        _mask(1, "flexible_time_block_causal_last", ("full", "none", "none", "none")),
    ),
    "positions": (_same, _posembs(posemb_type="learnable_prod"), _drop(*PATCH_POSITIONS)),
    "register positions": (_same, _registers_sincos, _drop("dec_registers_posemb_module"), _order),
    "tokens": (_same, _drop("dec_prefix_masking"), _drop("dec_nested_dropout"), _drop("dec_latent_dropout")),
    "n_eval": (_same, lambda e, d: e["enc_register_module"].update(n_eval=REGISTERS, n_max=12)),
    "time": (_same, _time(max_timestep=1000.0), _time(frequency_embedding_size=33)),
    "keys": (_same, _written_elsewhere),
}  # fmt: skip


@cache
def pairwise() -> list[dict[str, int]]:
    """Cases in which every two values of two options meet: greedily, the first values first."""
    names = list(OPTIONS)
    todo = {
        ((a, i), (b, j))
        for x, a in enumerate(names) for b in names[x + 1 :]
        for i in range(len(OPTIONS[a])) for j in range(len(OPTIONS[b]))
    }  # fmt: skip
    cases = []
    while todo:
        (a, i), (b, j) = min(todo)
        case = {a: i, b: j}
        for name in names:
            if name not in case:
                met = [len(todo & set(_pairs({**case, name: v}, names))) for v in range(len(OPTIONS[name]))]
                case[name] = met.index(max(met))
        todo -= set(_pairs(case, names))
        cases.append(case)
    return cases


def _pairs(case: dict[str, int], names: list[str]):
    held = [(name, case[name]) for name in names if name in case]
    return [(held[x], held[y]) for x in range(len(held)) for y in range(x + 1, len(held))]


def config_of(case: dict[str, int]) -> dict:
    config = published.video_config(width=64, depth=1, registers=REGISTERS)
    encoder, decoder = (config[side]["module_dict"] for side in ("encoder", "decoder"))
    for name in OPTIONS:
        OPTIONS[name][case[name]](encoder, decoder)
    return config


def weights_of(model: vft.Tokenizer) -> dict[str, torch.Tensor]:
    """Random weights under the published names, in their order."""
    generator = torch.Generator().manual_seed(0)
    named = {checkpoint.published_name(n, model.config): p.shape for n, p in model.named_parameters()}
    weights = {}
    for name in sorted(named):
        shape = named[name]
        scale = shape[-1] ** -0.5 if len(shape) == 2 and "registers" not in name else 0.3
        weights[name] = scale * torch.randn(shape, generator=generator)
    return weights


def model_of(case: dict[str, int]) -> vft.Tokenizer:
    model = vft.Tokenizer(parse_config(config_of(case)), "options")
    checkpoint.load_weights(model, model.config, weights_of(model))
    return model.eval().requires_grad_(False)


def inputs(case: dict[str, int]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Latents, ids and the registers kept of two samples."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ids = [torch.randint(64_000, (shape[1], REGISTERS), generator=generator) for shape in SHAPES]
    masks = "dec_nested_dropout" in config_of(case)["decoder"]["module_dict"]
    return latents, ids, list(KEEP) if masks else [REGISTERS] * 2


def ours(case: dict[str, int]) -> dict[str, torch.Tensor]:
    model = model_of(case)
    latents, ids, keep = inputs(case)
    values = model.encoder(latents).split([x.shape[1] * REGISTERS for x in latents])
    velocity = model.velocity(latents, TIME, ids, keep)
    return {f"values_{i}": v for i, v in enumerate(values)} | {f"velocity_{i}": v for i, v in enumerate(velocity)}


@torch.no_grad()
def theirs(case: dict[str, int]) -> dict[str, torch.Tensor]:
    """What the published code computes."""
    model = published.build(config_of(case))
    given = weights_of(model_of(case))
    found = model.load_state_dict(given, strict=False)
    assert not found.unexpected_keys and all(key.startswith("vae.") for key in found.missing_keys), found
    latents, ids, keep = inputs(case)
    outputs = {}
    # one by one: the published masks take samples of one shape
    for i, x in enumerate(latents):
        encoded = model.encoder({"vae_latents": [x[None]]})["enc_latents"][0]
        data = {
            "quants": [model.regularizer.indices_to_embedding(ids[i])[None]], "flow_noised_latents": [x[None]],
            "eval_keep_k": keep[i : i + 1], "flow_timesteps": torch.tensor([TIME]),
        }  # fmt: skip
        outputs[f"values_{i}"] = encoded.flatten(0, -2)
        outputs[f"velocity_{i}"] = model.decoder(data)["vae_latents_reconst"][0][0]
    return outputs


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@cache
def stored() -> dict[str, torch.Tensor]:
    return load_file(STORED)


def main() -> None:
    reason = published.use_checkout("FLEXKERNELS_VIDEOFLEXTOK")
    if reason:
        raise SystemExit(reason)
    outputs, worst = {}, 0.0
    for number, case in enumerate(pairwise()):
        for name, value in theirs(case).items():
            outputs[f"{number}.{name}"] = value.contiguous()
            worst = max(worst, error(ours(case)[name], value))
    save_file(outputs, STORED)
    print(json.dumps({"cases": len(pairwise()), "bytes": STORED.stat().st_size, "worst": worst}))


if __name__ == "__main__":
    main()
