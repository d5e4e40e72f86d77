"""The types that the packages carry (py.typed), on calls as a user's script makes them."""

import importlib.util
import inspect
import os
import subprocess
import sys

import pytest
import typed_use
import video_files
from paths import ROOT

import flexkernels
import vft
from flexkernels import typed

USE = ROOT / "tests" / "support" / "typed_use.py"


def test_typed_calls_run(tmp_path):
    video = tmp_path / "in.mp4"
    video_files.encode(video, video_files.ramp(17))
    typed_use.main(video, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (extra dev)")
@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("", None),
        ("assert_type(flexkernels.attention(q, q, q, layout), Tensor)", "flexkernels.attention(q, q, q)"),
        ("assert_type(tokens, vft.VideoTokens)", "assert_type(tokens, Tensor)"),
    ],
    ids=["as it is", "an argument left out", "another type"],
)
def test_mypy_strict(line, wrong, tmp_path):
    source = USE.read_text()
    assert line in source
    script = tmp_path / "script.py"
    script.write_text(source.replace(line, wrong or line))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path.parent / "mypy"), str(script)]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == (wrong is not None), run.stdout + run.stderr
    assert ("script.py" in run.stdout) == (wrong is not None), run.stdout


def test_both_packages_carry_their_types():
    for package in (flexkernels, vft):
        assert (ROOT / package.__name__ / "py.typed").is_file()


def test_a_function_called_as_another_shows_its_arguments():
    def given(a: int, *, b: str = "") -> float: ...

    @typed.called_as(given)
    def passing(*args, **options) -> bytes:
        return repr((args, options)).encode()

    assert str(inspect.signature(passing)) == "(a: int, *, b: str = '') -> bytes"
    assert passing(1, b="x") == b"((1,), {'b': 'x'})"
