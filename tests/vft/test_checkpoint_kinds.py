"""Checkpoints as other programs leave them: sharded, wrapped, averaged, in half precision, of a run, or not finite."""

import json
import shutil

import pytest
import torch
from paths import TOKENIZERS
from safetensors.torch import load_file, save_file
from small_tokenizer import small

import vft
from vft import cli
from vft.state_dict import published_names

KEY = "encoder.module_dict.enc_to_latents.proj.bias"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(TOKENIZERS / "base" / "config.json", folder)
    return folder


def weights():
    return load_file(TOKENIZERS / "weights.safetensors")


def check_loaded(reference, change=lambda x: x):
    want = weights()
    model = vft.Tokenizer.from_pretrained(reference)
    assert torch.equal(model.encoder.head.bias, change(want[KEY]).float())
    assert len(list(model.parameters())) == len(want)


def shards(folder, name="model"):
    tensors = weights()
    keys = sorted(tensors)
    files = [f"{name}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    where = {key: files[i % 3] for i, key in enumerate(keys)}
    for file in files:
        save_file({key: tensors[key] for key in keys if where[key] == file}, folder / file, {"format": "pt"})
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index, files


@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model"])
def test_shards(folder, name):
    shards(folder, name)
    check_loaded(folder)


def test_bad_shards(folder):
    index, files = shards(folder)
    content = json.loads(index.read_text())
    for shard, message in (
        ("../x", "from names to files beside it"),
        ("gone.safetensors", "the shard gone.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {KEY: shard}}))
        with pytest.raises(vft.CheckpointError, match=message):
            vft.Tokenizer.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"more": files[0]}}))
    with pytest.raises(
        vft.CheckpointError, match=rf"{files[0]} must hold more, as model\.safetensors\.index\.json says"
    ):
        vft.Tokenizer.from_pretrained(folder)
    (folder / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(vft.CheckpointError, match=r"one \*\.safetensors\.index\.json, got \['model"):
        vft.Tokenizer.from_pretrained(folder)


def test_any_name_beside_a_config(folder):
    save_file(weights(), folder / "ema-31000.safetensors", {"format": "pt"})
    check_loaded(folder)
    check_loaded(folder / "ema-31000.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(vft.CheckpointError, match="must carry its config"):
        vft.Tokenizer.from_pretrained(folder / "ema-31000.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.video_tokenizer."])
def test_prefixes(folder, prefix):
    save_file({prefix + key: value for key, value in weights().items()}, folder / "model.safetensors")
    check_loaded(folder)


def test_prefixes_inside(folder):
    inside = {key.replace("module_dict.", "module_dict._orig_mod.", 1): value for key, value in weights().items()}
    save_file(
        {k.replace(".blocks.0.", ".blocks.0.module."): v for k, v in inside.items()}, folder / "model.safetensors"
    )
    check_loaded(folder)


@pytest.mark.parametrize(
    ("plain", "average"), [("model.", "ema."), ("online_model.", "ema_model."), ("", "model_ema.module.")]
)
def test_the_average_is_kept(folder, plain, average):
    both = {plain + key: value for key, value in weights().items()}
    both |= {average + key: value / 2 for key, value in weights().items()} | {average + "decay": torch.ones(1)}
    both |= {"step": torch.ones(1)}
    save_file(both, folder / "model.safetensors")
    check_loaded(folder, lambda x: x / 2)


def test_two_tensors_of_one_name(folder):
    with pytest.raises(ValueError, match=r"the keys module\.a and a both stand for a"):
        published_names(["module.a", "a"])
    assert published_names(["ema.sos", "ema.step", "sos"]) == {"sos": "ema.sos"}
    save_file(weights() | {f"model.{KEY}": torch.zeros(6)}, folder / "model.safetensors")
    with pytest.raises(vft.CheckpointError, match=f"both stand for {KEY}"):
        vft.Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_storage(folder, dtype):
    save_file({key: value.to(dtype) for key, value in weights().items()}, folder / "model.safetensors")
    check_loaded(folder, lambda x: x.to(dtype))


def test_a_training_run_is_a_model(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.safetensors").write_bytes(b"")
    with pytest.raises(vft.CheckpointError, match="a training run that has not written one"):
        vft.Tokenizer.from_pretrained(run)
    model = small()
    model.save(run / "model.safetensors")
    again = vft.Tokenizer.from_pretrained(run)
    assert again.name == "run" and torch.equal(again.encoder.registers, model.encoder.registers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [KEY, "vae.first_mean"])
def test_weights_that_are_not_finite(folder, key, value, capsys):
    bad = weights() | {key: torch.full((6,), value, dtype=torch.float16)}
    save_file(bad, folder / "model.safetensors")
    with pytest.raises(vft.CheckpointError, match=f"{key} must be finite, got NaN or infinity .check_finite=False"):
        vft.Tokenizer.from_pretrained(folder)
    vft.Tokenizer.from_pretrained(folder, check_finite=False)
    assert cli.main(["bench", "decode", "--model", str(folder)]) == 2
    assert f"{key} must be finite" in capsys.readouterr().err


def semantok(folder, **fields):
    """A retrained VideoFlexTok as SemanTok publishes them."""
    config = json.loads((folder / "config.json").read_text())
    plain = {"dino_input": False, "global_token": False}
    (folder / "config.json").write_text(json.dumps({"videoflextok": config, "semantok": plain | fields}))
    save_file(weights(), folder / "model.safetensors")


def test_semantok(folder):
    semantok(folder)
    check_loaded(folder)
    model = vft.Tokenizer.from_pretrained(folder)
    assert (model.steps, model.guidance) == (50, vft.APG(scale=3.0, threshold=0.6, eta=0.0, momentum=0.0))
    model.save_pretrained(folder.parent / "again")
    assert vft.Tokenizer.from_pretrained(folder.parent / "again").fingerprint == model.fingerprint


@pytest.mark.parametrize("field", ["dino_input", "global_token"])
def test_semantok_with_dino_is_refused_by_name(folder, field):
    semantok(folder, **{field: True})
    with pytest.raises(vft.ConfigError, match=f"semantok.{field} must be False, got True: DINO features"):
        vft.Tokenizer.from_pretrained(folder)


def test_semantok_takes_the_codec_from_the_repository_that_it_names(folder, tmp_path, monkeypatch):
    import huggingface_hub as hub

    semantok(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hub_vae": {"repo": "org/vae", "revision": "v3"}}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_file(
        {"video_tokenizer.vae.x.encoder.y": torch.ones(2), "video_tokenizer.z": torch.ones(1)}, other / "m.safetensors"
    )
    asked = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda repo, revision, allow_patterns: asked.append((repo, revision)) or other
    )
    model = vft.Tokenizer.from_pretrained(folder)
    assert asked == [("org/vae", "v3")]
    assert model.codec_state.keys() == {"x.encoder.y"}
