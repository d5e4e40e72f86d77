"""The README's Python example runs as it stands, and its commands exist."""

import re
import shlex
import shutil
import subprocess

import pytest
from paths import ROOT

from vft import Tokenizer, cli, measure
from vft.config import make_config, parse_config
from vft.demo import CLIP

README = (ROOT / "README.md").read_text()


def test_python_example(tmp_path, monkeypatch):
    shutil.copy(CLIP, tmp_path / "in.mp4")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["video"].shape == (1, 3, 33, 64, 64)
    assert [x.shape for x in scope["clean"]] == [x.shape for x in scope["latents"]]
    assert scope["out"].shape == scope["q"].shape
    assert (tmp_path / "coarse.vft").stat().st_size < 500


def test_commands_exist(capsys):
    names = set(re.findall(r"^    vft (\w+)", README, re.MULTILINE)) | {"demo"}
    assert names == {"encode", "decode", "reconstruct", "generate", "info", "train", "eval", "bench", "demo", "view"}
    for name in names:
        assert cli.main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: vft {name}")


# what keeps a command of the README short
QUICK = {
    "train": ["--steps", "1", "--batch", "1", "--clips", "1"],
    "generate": ["--n", "1"],
    "eval": ["--clips", "2", "--video", "--model", "small.safetensors"],
    "bench": ["--seconds", "0.01"],
}
SMALL = make_config(codec="linear", encoder_width=32, decoder_width=32, head_dim=32, registers=2, size=16)
CEILING = {"copy_gb_s": 10.0, "gemm_fp32_gflop_s": 100.0, "gemm_bf16_gflop_s": 100.0}


def test_commands_run_in_order_in_one_folder(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "videos").mkdir()
    for name in ("in.mp4", "videos/a.mp4"):
        shutil.copy(CLIP, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "ceilings", lambda device: CEILING)
    Tokenizer(parse_config(SMALL), "small").save("small.safetensors")
    lines = re.findall(r"^    ((?:vft|head) .*)$", README, re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(re.sub(r" \[.*?\]", "", line), comments=True)
        if words[0] != "vft":
            subprocess.run(line, shell=True, check=True)
        else:
            assert cli.main([*words[1:], *QUICK.get(words[1], [])]) == 0, line
    made = {path.name for path in tmp_path.iterdir()}
    assert {"in.vft", "tokens", "coarse.vft", "out.mp4", "runs", "eval.json", "eval.png"} <= made
