"""Every option of the published configuration: computed as the published code does, or refused by name."""

import copy
import json
from dataclasses import replace

import published
import published_options as options
import pytest
import torch
from paths import TOKENIZERS

import vft
from vft.config import parse_config

# the published code's float32 outputs lie within 7e-7
TOLERANCE = 5e-6
CASES = range(31)


def test_the_cases_are_pairwise():
    cases = options.pairwise()
    assert len(cases) == len(CASES)
    names = list(options.OPTIONS)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            met = {(case[a], case[b]) for case in cases}
            assert len(met) == len(options.OPTIONS[a]) * len(options.OPTIONS[b]), (a, b)


@pytest.mark.parametrize("number", CASES)
def test_options(number):
    for name, value in options.ours(options.pairwise()[number]).items():
        assert options.error(value, options.stored()[f"{number}.{name}"]) < TOLERANCE, name


def test_options_against_a_checkout():
    reason = published.use_checkout("FLEXKERNELS_VIDEOFLEXTOK")
    if reason:
        pytest.skip(reason)
    for case in options.pairwise():
        got = options.ours(case)
        for name, value in options.theirs(case).items():
            assert options.error(got[name], value) < TOLERANCE, (case, name)


def test_saved_and_loaded_again(tmp_path):
    """A head without time, no biases, fewer registers than are stored."""
    case = {name: len(values) - 1 for name, values in options.OPTIONS.items()} | {"positions": 0, "n_eval": 1}
    model = options.model_of(case)
    assert model.decoder.head_modulation is None and model.encoder.registers.shape[1] > model.registers
    model.guidance = None
    model.save(tmp_path / "one.safetensors")
    again = vft.Tokenizer.from_pretrained(tmp_path / "one.safetensors")
    latents, ids, _ = options.inputs(case)
    assert all(
        torch.equal(a, b) for a, b in zip(model.encode_latents(latents), again.encode_latents(latents), strict=True)
    )
    x = model.decode_latents(ids, 8, 2, noise=latents)
    assert all(torch.equal(a, b) for a, b in zip(x, again.decode_latents(ids, 8, 2, noise=latents), strict=True))


def put(name, **fields):
    return lambda modules: modules[name].update(fields)


def moved(name, before):
    def change(modules):
        entry = modules.pop(name)
        entries = list(modules.items())
        at = [n for n, _ in entries].index(before)
        modules.clear()
        modules.update([*entries[:at], (name, entry), *entries[at:]])

    return change


def added(name, like, **fields):
    return lambda modules: modules.update({name: modules[like] | fields})


def borrowed(name, target, **fields):
    return lambda modules: modules.update({name: {"_target_": f"videoflextok.model.{target}", **fields}})


REFUSED = {
    "encoder": {
        "gated_mlp": (put("enc_transformer", gated_mlp=False), "gated_mlp must be True"),
        "qk_norm": (put("enc_transformer", qk_norm=False), "qk_norm must be True"),
        "act_layer": (put("enc_transformer", act_layer=None), "act_layer is not a known field"),
        "norm_layer": (put("enc_to_latents", norm_layer=None), "norm_layer is not a known field"),
        "no mask": (put("enc_transformer", block_mask_read_key=None), "block_mask_read_key must name the block mask"),
        "time": (put("enc_transformer", adaLN_emb_read_key="t"), "enc_transformer.adaLN_emb_read_key must be null"),
        "head time": (put("enc_to_latents", adaLN_emb_read_key="t"), "enc_to_latents.adaLN_emb_read_key must be null"),
        "order": (
            put("enc_seq_packer", input_list_read_keys=["enc_registers", "enc_patches"]),
            "input_list_read_keys must name patches, then registers, got .*: registers, then patches",
        ),
        "three lists": (
            put("enc_seq_packer", input_list_read_keys=["enc_patches", "enc_registers", "enc_registers"]),
            "must name patches, then registers",
        ),
        "unpacker": (put("enc_unpacker", inner_seq_write_keys=["a"]), "must name output patches, then output regis"),
        "head reads patches": (put("enc_to_latents", read_key="enc_patches"), "must name output registers"),
        "extra registers": (
            put("enc_register_module", extra_registers_write_key="more"), "extra_registers_write_key must be None",
        ),
        "n_eval": (put("enc_register_module", n_eval=17), "n_eval must be at most n_max 16, got 17"),
        "late positions": (moved("enc_posemb_module", "enc_unpacker"), "must name patches or registers before they"),
        "positions of registers": (
            added("more", "enc_posemb_module", read_key="enc_registers"), "must name patches or registers before",
        ),
        "table": (put("enc_posemb_module", max_sizes=[8, 8, 4]), "max_sizes must be equal for learnable_sum"),
        "dropout": (
            borrowed("drop", "preprocessors.token_dropout.MaskedNestedDropout", dim=128),
            "encoder.drop: a MaskedNestedDropout in the encoder is not",
        ),
    },
    "decoder": {
        "no time": (put("dec_transformer", adaLN_emb_read_key=None), "adaLN_emb_read_key must name the time embedding"),
        "packing": (
            put("dec_to_patches", adaLN_packing_fn_read_key="f"), "adaLN_packing_fn_read_key must be null",
        ),
        "one embedding": (put("dec_seq_packer", per_subseq_embs=False), "per_subseq_embs must be True"),
        "time tokens": (put("dec_time_embedder", temb_as_tokens=True), "temb_as_tokens must be False"),
        "mask of patches": (
            put("dec_nested_dropout", read_write_key="dec_patches"), "read_write_key must name registers",
        ),
        "two masks": (added("more", "dec_nested_dropout"), "read_write_key must name registers"),
        "switches": (
            put("dec_seq_packer", mask_mode="flexible_time_block_causal_last",
                cross_timestep_attention_config={"prefix2prefix": "half"}),
            r"cross_timestep_attention_config: cross_frame\['prefix_to_prefix'\] must be one of none, full",
        ),
        "null by one token": (
            put("dec_latent_dropout", replace_with_single_token=True), "replace_with_single_token must be False",
        ),
        "positions to another key": (
            put("dec_registers_posemb_module", write_key="placed"), "must name registers, got 'dec_quants'",
        ),
        "muP": (put("dec_to_patches", use_mup_readout=True), "use_mup_readout must be False"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("side", "name"), [(side, name) for side, cases in REFUSED.items() for name in cases])
def test_refused(side, name):
    config = json.loads((TOKENIZERS / "base" / "config.json").read_text())
    change, message = REFUSED[side][name]
    change(config["video_flex_tok"][side]["module_dict"])
    with pytest.raises(vft.ConfigError, match=message):
        parse_config(config)


ACCEPTED = {
    "enc_seq_packer": {"max_seq_len": None, "repa_mask_mode": "full", "repa_patch_index": 0},
    "enc_transformer": {"drop": 0.1, "drop_path_rate": 0.1, "use_act_checkpoint": True, "intermediate_layers": [1]},
    "enc_to_latents": {"dtype_override": "fp32", "weight_init_style": "zero"},
    "enc_register_module": {"size_sampling_mode": "uniform", "extra_registers_dim": None},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_matters_in_training_alone_is_not_read(name):
    config = json.loads((TOKENIZERS / "base" / "config.json").read_text())
    plain = parse_config(copy.deepcopy(config))
    config["video_flex_tok"]["encoder"]["module_dict"][name].update(ACCEPTED[name])
    config["video_flex_tok"]["regularizer"] |= {"apply_corrupt_tokens_p": 0.2, "packed_call": True}
    config["video_flex_tok"]["vae"]["chunk_size"] = None
    config["video_flex_tok"]["flow_matching_noise_module"] |= {"cond_sigma_range": [0.0, 0.02], "cond_noise_prob": 0.5}
    assert replace(parse_config(config), raw={}) == replace(plain, raw={})
