"""Checkpoints: every way in, and every way a bad one is refused."""

import copy
import json
import shutil

import pytest
import torch
from paths import TOKENIZERS
from safetensors.torch import load_file, save_file

import vft
from vft import checkpoint
from vft.config import make_config, parse_config

KEY = "encoder.module_dict.enc_to_latents.proj.bias"


@pytest.fixture
def folder(tmp_path):
    shutil.copy(TOKENIZERS / "base" / "config.json", tmp_path)
    shutil.copy(TOKENIZERS / "weights.safetensors", tmp_path / "model.safetensors")
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_directory(folder):
    model = vft.Tokenizer.from_pretrained(folder)
    want = load_file(folder / "model.safetensors")
    assert torch.equal(model.encoder.head.bias, want[KEY].float())
    assert len(list(model.parameters())) == len(want)
    assert (model.registers, model.config.levels, model.size) == (16, (8, 8, 8, 5, 5, 5), 64)
    assert not model.training


def test_hub_prefix_and_training_heads(folder):
    config = json.loads((folder / "config.json").read_text())
    modules = config["video_flex_tok"]["encoder"]["module_dict"]
    modules["aux_head"] = {"_target_": "videoflextok.model.postprocessors.heads.TransformerHead", "dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.module_dict.aux_head.out_proj.weight"] = torch.zeros(2, 2)
    save_file({f"video_tokenizer.{k}": v for k, v in tensors.items()}, folder / "model.safetensors")
    model = vft.Tokenizer.from_pretrained(folder)
    assert torch.equal(model.encoder.head.bias, tensors[KEY].float())


def test_single_file_round_trip(folder, tmp_path):
    model = vft.Tokenizer.from_pretrained(folder)
    model.steps, model.guidance = 7, vft.APG(scale=3.0)
    path = tmp_path / "one.safetensors"
    model.save(path)
    assert load_file(path).keys() == load_file(folder / "model.safetensors").keys()
    again = vft.Tokenizer.from_pretrained(path)
    assert same_weights(model, again)
    assert (again.steps, again.guidance, again.config) == (7, vft.APG(scale=3.0), model.config)


@pytest.mark.parametrize("guidance", [None, vft.CFG(2.0), vft.APG(scale=3.0, eta=0.5)])
def test_the_sampler_is_kept(folder, tmp_path, guidance):
    model = vft.Tokenizer.from_pretrained(folder)
    assert (model.steps, model.guidance) == (40, vft.APG(25.0))
    model.guidance = guidance
    model.save(tmp_path / "one.safetensors")
    assert vft.Tokenizer.from_pretrained(tmp_path / "one.safetensors").guidance == guidance


@pytest.mark.parametrize("sampler", ["x", {"steps": 0, "guidance": None}, {"steps": 4, "guidance": {"type": "os"}}])
def test_a_bad_sampler_is_refused(folder, sampler):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sampler": sampler}))
    with pytest.raises(vft.CheckpointError, match="sampler must state"):
        vft.Tokenizer.from_pretrained(folder)


def places(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def test_damaged_configs_never_raise_anything_else():
    """Every entry in turn dropped or replaced by something of another kind."""
    whole = json.loads((TOKENIZERS / "base" / "config.json").read_text())
    for path in places(whole):
        for value in (None, "x", -1, [], {}, "drop"):
            config = copy.deepcopy(whole)
            parent = config
            for key in path[:-1]:
                parent = parent[key]
            if value == "drop":
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            try:
                parse_config(config)
            except vft.ConfigError as error:
                assert "\n" not in str(error)


def test_published_single_file_metadata(folder, tmp_path):
    """The published single files carry the model's tree as Python literals, None included."""
    tree = json.loads((folder / "config.json").read_text())["video_flex_tok"]
    tree["encoder"]["module_dict"]["enc_to_latents"]["dtype_override"] = None
    path = tmp_path / "published.safetensors"
    save_file(load_file(folder / "model.safetensors"), path, {k: str(v) for k, v in tree.items()})
    assert vft.Tokenizer.from_pretrained(path).config.codec == "vidtok_kl_causal_488_16chn"


def test_made_config_parses():
    config = parse_config(make_config(encoder_width=64, decoder_width=64, size=32, codec="linear"))
    assert config.register_ops == ("posemb", "keep", "prefix", "null")
    assert (config.encoder.mask, config.decoder.mask) == ("frame_causal_prefix", "frame_causal")


BAD_TENSORS = {
    "missing key": (lambda t: t.pop(KEY), "lacks the key encoder.module_dict.enc_to_latents.proj.bias"),
    "surplus key": (lambda t: t.update(other=torch.zeros(1)), "unknown key other"),
    "wrong shape": (lambda t: t.update({KEY: torch.zeros(5)}), r"must have shape \[6\], got \[5\]"),
    "integers": (lambda t: t.update({KEY: torch.zeros(6, dtype=torch.int64)}), "must be floating point"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(folder, case):
    change, message = BAD_TENSORS[case]
    rewrite(folder, change)
    with pytest.raises(vft.CheckpointError, match=message):
        vft.Tokenizer.from_pretrained(folder)


def set_in(*path):
    def change(config):
        *where, key, value = path
        for name in where:
            config = config[name]
        config[key] = value

    return change


ENCODER = ("video_flex_tok", "encoder", "module_dict")
DECODER = ("video_flex_tok", "decoder", "module_dict")
BAD_CONFIGS = {
    "os.system": (set_in(*ENCODER, "enc_to_latents", "_target_", "os.system"), "allowed _target_, got 'os.system'"),
    "nested": (set_in("video_flex_tok", "vae", "extra_key", {"_target_": "subprocess.run"}), "got 'subprocess.run'"),
    "prefix alone": (set_in(*ENCODER, "enc_to_latents", "_target_", "videoflextok.evil"), "allowed _target_"),
    "number": (set_in(*ENCODER, "enc_to_latents", "_target_", 3), "allowed _target_, got 3"),
    "unknown field": (set_in(*ENCODER, "enc_transformer", "rotary", True), "rotary is not a known field"),
    "unsupported value": (set_in(*ENCODER, "enc_to_latents", "use_mup_readout", True), "use_mup_readout must be False"),
    "rotary": (set_in(*ENCODER, "enc_transformer", "rope_forward_read_key", "rope"), "must be None, got 'rope'"),
    "pooled registers": (set_in(*ENCODER, "enc_register_module", "ordering_mode", "avg_pool"), "must be 'nested'"),
    "mask": (set_in(*ENCODER, "enc_seq_packer", "mask_mode", "diagonal"), "mask_mode must be one of"),
    "width": (set_in(*ENCODER, "enc_transformer", "dim", 100), "multiple of head_dim"),
    "width mismatch": (set_in(*ENCODER, "enc_patch_emb", "dim", 64), "must be the transformer's 128"),
    "levels": (set_in("video_flex_tok", "regularizer", "levels", [8, 8]), "levels must match"),
    "expansion": (set_in(*DECODER, "dec_transformer", "adaLN_expansion", 1), "adaLN_expansion must be 2"),
    "posemb": (set_in(*ENCODER, "enc_posemb_module", "posemb_scaling", "interpolate"), "must be 'absolute'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(folder, case):
    change, message = BAD_CONFIGS[case]
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(vft.ConfigError, match=message):
        vft.Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("module", ["enc_transformer", "enc_to_latents", "enc_register_module", "enc_patch_emb"])
def test_a_missing_module_is_named(folder, module):
    config = json.loads((folder / "config.json").read_text())
    target = config["video_flex_tok"]["encoder"]["module_dict"].pop(module)["_target_"].rsplit(".", 1)[-1]
    with pytest.raises(vft.ConfigError, match=f"encoder must have a {target}"):
        parse_config(config)


def test_parsing_leaves_the_config_alone():
    config = json.loads((TOKENIZERS / "base" / "config.json").read_text())
    before = copy.deepcopy(config)
    parse_config(config)
    assert config == before


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_truncated_weights(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(vft.CheckpointError, match="complete safetensors file"):
        vft.Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_broken_config_file(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(vft.CheckpointError, match=r"config\.json must"):
        vft.Tokenizer.from_pretrained(folder)


def test_no_such_model(tmp_path, folder):
    with pytest.raises(vft.CheckpointError, match="embedded model"):
        vft.Tokenizer.from_pretrained("nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(vft.CheckpointError, match="must hold a config"):
        vft.Tokenizer.from_pretrained(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(vft.CheckpointError, match=r"one model\.safetensors"):
        vft.Tokenizer.from_pretrained(folder)
    plain = tmp_path / "empty" / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    with pytest.raises(vft.CheckpointError, match="must carry its config"):
        vft.Tokenizer.from_pretrained(plain)


def test_hub_reference(monkeypatch, folder):
    """The hub id is split into repository, revision and folder; the download itself is the hub library's."""
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return folder.parent

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = vft.Tokenizer.from_pretrained(f"org/model@v2/{folder.name}")
    assert model.registers == 16
    assert asked["repo"] == "org/model"
    assert asked["revision"] == "v2"
    assert asked["patterns"][:2] == [f"{folder.name}/config.json", f"{folder.name}/model.safetensors"]
    assert all(pattern.startswith(f"{folder.name}/") for pattern in asked["patterns"])


def test_codec_without_weights_is_a_clear_error(folder):
    model = vft.Tokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="vidtok_kl_causal_488_16chn"):
        model.encode(torch.zeros(17, 64, 64, 3, dtype=torch.uint8))


def test_save_is_atomic(folder, tmp_path, monkeypatch):
    model = vft.Tokenizer.from_pretrained(folder)
    path = tmp_path / "kept.safetensors"
    model.save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "serialize", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "kept.safetensors", "model.safetensors"]
