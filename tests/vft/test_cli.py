import argparse
import dataclasses
import io
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import flexkernels
from flexkernels import info as installation
from flexkernels import library
from vft import Tokenizer, cli, commands, demo, metrics, video
from vft.commands import options
from vft.config import make_config, parse_config
from vft.solver import SOLVERS
from vft.tokens import VideoTokens

FAST = ["--steps", "1", "--guidance", "none"]
CLIP = str(demo.CLIP)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file with random weights, 8 registers, 64x64."""
    config = make_config(
        codec="linear", encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, registers=8, size=64
    )
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    torch.manual_seed(0)
    Tokenizer(parse_config(config), "small").save(path)
    return str(path)


@pytest.fixture(scope="module")
def tokens_file(model, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tokens") / "bunny.vft")
    assert cli.main(["encode", CLIP, "-o", path, "--model", model]) == 0
    return path


def failure(capsys, argv):
    """Run a command that must fail; return its one line on stderr."""
    assert cli.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"vft: error: [^\n]+\n", err), err
    return err


def clip_of(path, frames, height=48, width=64, fps=12.5):
    pixels = torch.randint(256, (1, height // 8, width // 8, 3), dtype=torch.uint8).repeat(frames, 1, 1, 1)
    video.write_video(path, video.resize(pixels, height, width), fps)
    return str(path)


def test_encode_decode_keeps_every_frame(tmp_path, model, tokens_file, capsys):
    tokens = VideoTokens.load(tokens_file)
    assert tokens.ids.shape == (9, 8)
    assert (tokens.frames, tokens.fps, tokens.height, tokens.width) == (33, 8, 128, 128)
    assert cli.main(["decode", tokens_file, "-o", f"{tmp_path}/b.mp4", "--model", model, *FAST]) == 0
    back = video.read_video(tmp_path / "b.mp4")
    assert back.frames.shape == (33, 64, 64, 3) and back.fps == 8
    assert "33 frames, 8 fps" in capsys.readouterr().out


@pytest.mark.parametrize("frames", [1, 2, 17, 20])
def test_lengths_that_do_not_fill_a_chunk(tmp_path, model, frames):
    source = clip_of(tmp_path / "a.mp4", frames)
    assert cli.main(["encode", source, "-o", f"{tmp_path}/a.vft", "--model", model]) == 0
    assert len(VideoTokens.load(tmp_path / "a.vft").ids) == 1 + -(-(frames - 1) // 4)
    assert cli.main(["decode", f"{tmp_path}/a.vft", "-o", f"{tmp_path}/b.mkv", "--model", model, *FAST]) == 0
    back = video.read_video(tmp_path / "b.mkv")
    assert len(back.frames) == frames and back.fps == 12.5


def test_half_of_a_file_is_a_coarser_video(tmp_path, model, tokens_file):
    data = Path(tokens_file).read_bytes()
    (tmp_path / "half.vft").write_bytes(data[: len(data) - 9 * 2 * 4 - 5])
    assert VideoTokens.load(tmp_path / "half.vft").registers == 3
    command = ["-o", f"{tmp_path}/a.mp4", "--model", model, *FAST]
    assert cli.main(["decode", f"{tmp_path}/half.vft", *command]) == 0
    from_half = video.read_video(tmp_path / "a.mp4").frames
    assert cli.main(["decode", tokens_file, "-k", "3", *command]) == 0
    assert torch.equal(video.read_video(tmp_path / "a.mp4").frames, from_half)


def test_keep_is_the_same_at_either_end(tmp_path, model, tokens_file):
    assert cli.main(["encode", CLIP, "-o", f"{tmp_path}/a.vft", "-k", "2", "--model", model]) == 0
    assert torch.equal(VideoTokens.load(tmp_path / "a.vft").ids, VideoTokens.load(tokens_file).truncate(2).ids)


def test_decode_size_and_seed(tmp_path, model, tokens_file):
    def decoded(*options):
        assert cli.main(["decode", tokens_file, "-o", f"{tmp_path}/a.mkv", "--model", model, *FAST, *options]) == 0
        return video.read_video(tmp_path / "a.mkv").frames

    assert decoded("--size", "96").shape == (33, 96, 96, 3)
    assert torch.equal(decoded("--seed", "1"), decoded("--seed", "1"))
    assert not torch.equal(decoded("--seed", "1"), decoded("--seed", "2"))


def test_reconstruct_prints_the_psnr_of_its_output(tmp_path, model, capsys):
    path = f"{tmp_path}/a.mp4"
    assert cli.main(["reconstruct", CLIP, "-o", path, "-k", "4", "--quality", "0", "--model", model, *FAST]) == 0
    out = capsys.readouterr().out
    source = video.read_video(CLIP, 64).frames
    printed = float(re.search(r"PSNR: ([\d.]+) dB", out)[1])
    assert printed == pytest.approx(metrics.frames_psnr(video.read_video(path).frames, source), abs=0.5)
    assert "9 x 4 = 36 tokens, 72 bytes" in out


def test_demo(tmp_path, model, capsys):
    folder = tmp_path / "new" / "folder"
    assert cli.main(["demo", "-o", str(folder), "--model", model, *FAST]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["demo.html", "demo.mp4", "demo.png"]
    movie = video.read_video(folder / "demo.mp4")
    # source, k = 1, 8
    assert movie.fps == 8 and movie.frames.shape[0] == 33 and movie.frames.shape[2] == 8 + 3 * (192 + 8)
    assert Image.open(folder / "demo.png").height > 3 * 128
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d", line)]
    assert [row[:3] for row in rows] == [["1", "9", "18"], ["8", "72", "144"]]
    # the panels of the movie, scaled back, are what was measured
    panels = [video.resize(movie.frames[:, 8:200, x : x + 192], 64, 64) for x in (8, 208, 408)]
    for row, panel in zip(rows, panels[1:], strict=True):
        assert float(row[4]) == pytest.approx(metrics.frames_psnr(panel, panels[0]), abs=1.5)
    assert "CC BY 3.0" in out


def test_info(tmp_path, model, tokens_file, capsys):
    for target, words in [
        (tokens_file, ["9 x 8 = 72 tokens", "128x128", "64000 ids", "small"]),
        (CLIP, ["h264", "33", "44379"]),
        (model, ["64x64", "8,8,8,5,5,5", "small"]),
    ]:
        assert cli.main(["info", target]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words), out


def test_info_without_a_target_is_about_the_installation(capsys):
    assert cli.main(["info"]) == 0
    from_vft = capsys.readouterr().out
    installation.main([])
    assert from_vft == capsys.readouterr().out and flexkernels.__version__ in from_vft


def test_options_reach_the_library(tmp_path, model, tokens_file, monkeypatch):
    seen = {}

    def stream(self, tokens, **options):
        seen.update(options, backend=flexkernels.library.current_backend(), threads=torch.get_num_threads())
        yield torch.zeros(3, 33, 64, 64)

    monkeypatch.setattr(Tokenizer, "decode_stream", stream)
    threads = torch.get_num_threads()
    argv = ["decode", tokens_file, "-o", f"{tmp_path}/a.mp4", "--model", model, "-k", "2", "--steps", "3"]
    argv += ["--solver", "heun"]
    try:
        assert (
            cli.main([*argv, "--guidance", "cfg:2.5", "--backend", "reference", "--threads", "1", "--seed", "7"]) == 0
        )
    finally:
        torch.set_num_threads(threads)
    assert callable(seen.pop("progress"))
    assert seen == {
        "keep": 2, "steps": 3, "guidance": flexkernels.CFG(2.5), "seed": 7, "solver": "heun", "backend": "reference",
        "threads": 1, "force": False,
    }  # fmt: skip
    assert flexkernels.library.current_backend() == "auto"
    assert cli.main([*argv, "--guidance", "apg:9"]) == 0 and seen["guidance"] == flexkernels.APG(scale=9.0)
    assert cli.main([*argv, "--guidance", "none"]) == 0 and seen["guidance"] is None
    assert cli.main([*argv, "--guidance", "cfg:3", "--interval", "0.2", "0.8", "--null-every", "2"]) == 0
    scale = seen["guidance"].scale
    assert [scale(t) for t in (0.1, 0.2, 0.8, 0.9)] == [1.0, 3.0, 3.0, 1.0] and seen["null_every"] == 2
    # what is not given is left to the model
    seen.clear()
    assert cli.main(["decode", tokens_file, "-o", f"{tmp_path}/a.mp4", "--model", model]) == 0
    assert {"steps", "guidance"}.isdisjoint(seen)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["encode", "IN"], "required: -o/--output"),
        (["encode", "IN", "-o", "OUT.vft", "-k", "0"], "argument -k/--keep: must be at least 1, got 0"),
        (["encode", "IN", "-o", "OUT.vft", "-k", "1000"], "keep must be between 1 and 8, got 1000"),
        (["encode", "IN", "-o", "OUT.vft", "-k", "two"], "invalid integer value: 'two'"),
        (["encode", "missing.mp4", "-o", "OUT.vft"], "missing.mp4: no such file"),
        (["encode", "EMPTY", "-o", "OUT.vft"], "empty"),
        (["encode", "RANDOM", "-o", "OUT.vft"], "not a video"),
        (["encode", "CUT.mp4", "-o", "OUT.vft"], "not a video, or a damaged one"),
        (["encode", "IN", "-o", "OUT/missing/b.vft"], "does not exist"),
        (["encode", "IN", "-o", "/dev/null"], "regular file"),
        (["encode", "IN", "-o", "OUT.vft", "--model", "nonsense"], "nonsense"),
        (["encode", "IN", "-o", "OUT.vft", "--model", "RANDOM"], "RANDOM"),
        (["encode", "IN", "-o", "OUT.vft", "--device", "toaster"], "toaster"),
        (["encode", "IN", "-o", "OUT.vft", "--backend", "abacus"], "invalid choice: 'abacus'"),
        (["encode", "IN", "-o", "OUT.vft", "--threads", "0"], "must be at least 1, got 0"),
        (["decode", "missing.vft", "-o", "OUT.mp4"], "missing.vft: No such file"),
        (["decode", "EMPTY", "-o", "OUT.mp4"], "the file is empty"),
        (["decode", "RANDOM", "-o", "OUT.mp4"], "not a .vft file"),
        (["decode", "CUT.vft", "-o", "OUT.mp4"], "first register is not complete"),
        (["decode", "TOKENS", "-o", "OUT.mp4", "-k", "1000"], "keep must be between 1 and 8, got 1000"),
        (["decode", "TOKENS", "-o", "OUT.mp4", "-k", "0"], "must be at least 1, got 0"),
        (["decode", "TOKENS", "-o", "OUT.txt"], "must end in .mp4"),
        (["decode", "TOKENS", "-o", "OUT.mp4", "--steps", "0"], "must be at least 1, got 0"),
        (["decode", "TOKENS", "-o", "OUT.mp4", "--interval", "0.2", "0.8"], "--interval needs --guidance"),
        (["decode", "TOKENS", "-o", "OUT.mp4", "--interval", "1", "0", "--guidance", "apg"], "low and high must"),
        (["decode", "TOKENS", "-o", "OUT.mp4", "--guidance", "strong"], "guidance must be none"),
        (["decode", "TOKENS", "-o", "OUT.mp4", "--guidance", "cfg:much"], "could not convert"),
        (["decode", "TOKENS", "-o", "OUT.mp4", "--quality", "99"], "quality must be between 0 and 51"),
        (["decode", "LONG.vft", "-o", "OUT.mp4"], "9 rows hold 33 of 999"),
        (["reconstruct", "RANDOM", "-o", "OUT.mp4"], "not a video"),
        (["reconstruct", "IN", "-o", "OUT.mp4", "-k", "9"], "keep must be between 1 and 8, got 9"),
        (["info", "missing.mp4"], "missing.mp4: No such file"),
        (["info", "RANDOM"], "not a video"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, model, tokens_file, capsys, argv, message):
    files = {"IN": CLIP, "TOKENS": tokens_file}
    for name, content in {
        "EMPTY": b"",
        "RANDOM": torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes(),
        "CUT.mp4": demo.CLIP.read_bytes()[:20000],
        "CUT.vft": Path(tokens_file).read_bytes()[:173],
    }.items():
        files[name] = str(tmp_path / name)
        (tmp_path / name).write_bytes(content)
    tokens = VideoTokens.load(tokens_file)
    dataclasses.replace(tokens, frames=999).save(tmp_path / "LONG.vft")
    files["LONG.vft"] = str(tmp_path / "LONG.vft")
    before = sorted(tmp_path.iterdir())
    argv = [files.get(a, a.replace("OUT", f"{tmp_path}/out")) for a in argv]
    if argv and argv[0] in ("encode", "decode", "reconstruct") and "--model" not in argv:
        argv += ["--model", model]
    if argv and argv[0] in ("decode", "reconstruct"):
        argv += [a for i in (0, 2) for a in FAST[i : i + 2] if FAST[i] not in argv]
    assert message in failure(capsys, argv)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct"])
def test_an_input_is_never_the_output(tmp_path, model, tokens_file, capsys, command):
    source = tmp_path / "a.mp4"
    shutil.copy(tokens_file if command == "decode" else CLIP, source)
    before = source.read_bytes()
    (tmp_path / "link.mp4").symlink_to(source)
    argv = [command, source, "--model", model] + (FAST if command != "encode" else [])
    for output in (source, tmp_path / "link.mp4", f"{tmp_path}/../{tmp_path.name}/a.mp4"):
        assert "must be another file than the input" in failure(capsys, [*argv, "-o", output])
    assert source.read_bytes() == before


def test_a_model_is_never_the_output(tmp_path, model, capsys):
    copied = Path(shutil.copy(model, tmp_path / "m.safetensors"))
    assert "than the input" in failure(capsys, ["encode", CLIP, "--model", copied, "-o", copied])
    assert "than the input" in failure(capsys, ["eval", "--model", copied, "-o", copied])
    assert copied.read_bytes() == Path(model).read_bytes()


def test_standard_input_and_output(tmp_path, model, tokens_file, monkeypatch, capfdbinary):
    command = [sys.executable, "-m", "vft", "encode", "-", "-o", "-", "--model", model]
    with open(CLIP, "rb") as clip:
        done = subprocess.run(command, stdin=clip, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout == Path(tokens_file).read_bytes()
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(done.stdout[:173])))
    assert cli.main(["decode", "-", "-o", f"{tmp_path}/a.mp4", "--model", model, *FAST]) == 2
    assert b"standard input: the first register is not complete" in capfdbinary.readouterr().err
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(done.stdout)))
    assert cli.main(["decode", "-", "-o", f"{tmp_path}/a.mp4", "--model", model, *FAST]) == 0
    assert len(video.read_video(tmp_path / "a.mp4").frames) == 33


def test_other_outputs_are_files(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "output '-' must be a file" in failure(capsys, ["eval", "-o", "-", "--model", model])
    assert "must end in .mp4" in failure(capsys, ["reconstruct", CLIP, "-o", "-", "--model", model])
    assert "output '-' must be a folder" in failure(capsys, ["demo", "-o", "-", "--model", model])
    assert "output '-' must be a folder" in failure(capsys, ["train", "tokenizer", "-o", "-", "--clips", "1"])
    assert "must be folders with --batch" in failure(capsys, ["encode", ".", "-o", "-", "--batch", "--model", model])
    assert not os.listdir(tmp_path)


def test_the_demo_replaces_only_in_a_folder_that_is_named(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.png").write_text("mine")
    error = failure(capsys, ["demo", "--model", model, *FAST])
    assert "output 'demo.png' exists and was not named: give a folder with -o" in error
    assert os.listdir(tmp_path) == ["demo.png"] and Path("demo.png").read_text() == "mine"
    assert cli.main(["demo", "-o", ".", "--model", model, *FAST]) == 0
    assert Path("demo.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_of_another_model_are_not_decoded_by_the_default(tmp_path, tokens_file, capsys):
    assert "made by the model 'small'" in failure(capsys, ["decode", tokens_file, "-o", tmp_path / "a.mp4"])


def test_a_failing_backend_is_one_line(tmp_path, model, capsys):
    argv = ["encode", CLIP, "-o", tmp_path / "a.vft", "--model", model, "--backend", "cuda"]
    if torch.cuda.is_available():
        pytest.skip("the cuda backend serves this machine")
    assert "cuda" in failure(capsys, argv)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["decode", "missing.vft", "-o", f"{tmp_path}/a.mp4", "--debug"])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vft {flexkernels.__version__}\n"


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)


def test_the_package_is_the_command():
    done = python("-m", "vft", "--version")
    assert done.returncode == 0 and done.stdout == f"vft {flexkernels.__version__}\n"
    assert python("-m", "vft", "fly").returncode == 2


@pytest.mark.parametrize("argv", ["--help", "--version", "decode --help", "encode in.mp4 -k 0", "eval -o a.json"])
def test_arguments_are_read_without_torch_and_fast(argv):
    code = """if True:
        import sys, time
        from vft import cli
        cli._run = lambda args: print("ran")
        code = cli.main(sys.argv[1:])
        print(code, "torch" in sys.modules, time.process_time())
    """
    done = python("-c", code, *argv.split())
    exit_code, torch_imported, seconds = done.stdout.split()[-3:]
    assert exit_code == ("2" if "-k 0" in argv else "0") and torch_imported == "False", done
    assert ("ran\n" in done.stdout) == ("eval" in argv)
    # of this process, whatever else the machine does
    assert float(seconds) < 0.6


def test_names_that_stand_twice_are_the_same():
    assert tuple(SOLVERS) == options.SOLVERS and options.BACKENDS == library.BACKENDS
    parser = argparse.ArgumentParser()
    options.add_video_output(parser)
    assert all(suffix in parser.format_help() for suffix in video.OUTPUT_FORMATS)


def test_every_command_has_a_file():
    modules = {m.name for m in pkgutil.iter_modules(commands.__path__)}
    assert modules == {*cli.COMMANDS, "options"}


def test_completion(capsys):
    """The words that bash would complete."""
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -Uz bashcompinit")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = 'COMP_WORDS=(vft "$@"); COMP_CWORD=$#; _vft; echo "${COMPREPLY[@]}"'

    def completed(*words):
        done = subprocess.run(["bash", "-c", script + ask, "bash", *words], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("en") == ["encode"] and set(completed("")) == set(cli.COMMANDS)
    assert completed("decode", "--solver", "ab") == ["ab2", "ab3"]
    # of every kind of training
    assert completed("train", "--lo") == ["--lora"] and completed("train", "--tab") == ["--tables"]
    assert completed("train", "gen") == ["generator"]


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "vft.cli", "info"], stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


def test_pipes_get_no_progress_bar(tmp_path, model, tokens_file):
    argv = ["decode", tokens_file, "-o", f"{tmp_path}/a.mp4", "--model", model, *FAST]
    done = subprocess.run([sys.executable, "-m", "vft.cli", *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path}/a.mp4: 33 frames")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_file(tmp_path, model, tokens_file, monkeypatch, number, code):
    def stream(self, tokens, **options):
        # more than the encoder holds back, so that the file is open
        yield torch.zeros(3, 200, 64, 64)
        assert len(os.listdir(tmp_path)) == 1
        os.kill(os.getpid(), number)
        yield torch.zeros(3, 16, 64, 64)

    monkeypatch.setattr(Tokenizer, "decode_stream", stream)
    before = signal.getsignal(signal.SIGTERM)
    # a process started in the background may have been told to ignore Ctrl-C
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["decode", tokens_file, "-o", f"{tmp_path}/a.mkv", "--model", model]) == code
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert not os.listdir(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
