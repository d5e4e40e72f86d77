"""The README's Python example runs as it stands, and its commands exist."""

import re
import shutil

from paths import ROOT

from vft import cli
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
    assert names == {"encode", "decode", "reconstruct", "generate", "info", "train", "eval", "bench", "demo"}
    for name in names:
        assert cli.main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: vft {name}")
