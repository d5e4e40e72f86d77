"""What an import brings along: nothing before it is used, and no module imports itself through others."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vft

ROOT = Path(vft.__file__).parents[1]


WITHOUT_VIDEO = """
import sys
sys.modules.update(dict.fromkeys(["av", "PIL", "matplotlib", "huggingface_hub"]))
import torch, flexkernels, vft

tok = vft.Tokenizer.from_pretrained("tiny")
ids = tok.encode_latents(torch.randn(1, tok.config.channels, 2, 8, 8))
assert tok.codec.decode(torch.stack(tok.decode_latents(ids))).shape == (1, 3, 5, 64, 64)
assert tok.decode(tok.encode(torch.zeros(1, 3, 5, 64, 64))).shape == (1, 3, 5, 64, 64)
vft.Generator.from_pretrained("tiny").generate(class_id=0, frames=1, tokens_per_frame=1)

from vft import demo, video
frames = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
for call in (
    lambda: tok.encode(demo.CLIP),
    lambda: video.write_video(sys.argv[1], frames, 8),
    lambda: video.contact_sheet([("a", frames)]),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_models_work_where_nothing_can_open_a_video(tmp_path):
    command = [sys.executable, "-c", WITHOUT_VIDEO, str(tmp_path / "a.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    needs_av = "reading or writing a video file needs av: pip install av"
    assert done.stdout.splitlines() == [needs_av, needs_av, "a picture needs PIL: pip install pillow"], done.stderr
    assert not list(tmp_path.iterdir())


def test_import_vft_is_light_and_complete():
    code = "import sys, vft; assert not {'torch', 'numpy', 'av'} & set(sys.modules); vft.solver.interval"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
    public = {
        "APG", "CFG", "CheckpointError", "ConfigError", "Generator", "GeneratorConfig", "Tokenizer", "TokenizerConfig",
        "TokensError", "VideoError", "VideoTokens", "__version__", "time_first",
    }  # fmt: skip
    assert set(vft.__all__) == public and public <= set(dir(vft))
    for name in public - {"__version__"}:
        assert getattr(vft, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'vft' has no attribute 'Tokeniser'"):
        vft.Tokeniser  # noqa: B018


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules among `modules` that a file imports anywhere, also in functions."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *filter(None, [node.module])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= names & modules or {source}
    return found & modules


def test_no_module_of_vft_imports_itself_through_others():
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "vft").rglob("*.py")}
    graph = {name: imported(path, set(files)) - {name} for name, path in files.items() if "__" not in name}
    assert "vft.codec" in graph["vft.vae"] and "vft.solver" in graph["vft.integrations.engine"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")
