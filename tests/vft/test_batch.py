"""A folder of videos to a folder of tokens: complete, resumable, sharded, and not stopped by a bad video."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch

from vft import Tokenizer, batch, cli, video
from vft.config import make_config, parse_config
from vft.tokens import VideoTokens

LENGTHS = {"a.mp4": 20, "b.mkv": 1, "same.mp4": 33, "same.mkv": 3, "deep/er/same.mp4": 50, "deep/z.MP4": 17}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    config = make_config(
        codec="linear", encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, registers=8, size=32
    )
    torch.manual_seed(0)
    Tokenizer(parse_config(config), "small").save(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for name, frames in LENGTHS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        clip_of(root / name, frames)
    (root / "notes.txt").write_text("not a video")
    (root / "._a.mp4").write_text("hidden")
    return root


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def clip_of(path, frames, size=40):
    generator = torch.Generator().manual_seed(frames)
    pixels = torch.randint(256, (frames, 5, 5, 3), dtype=torch.uint8, generator=generator)
    video.write_video(path, video.resize(pixels, size, size), 10)


def command(folder, output, model, *options):
    return ["encode", str(folder), "--out", str(output), "--batch", "--model", model, *options]


def lines(output):
    parts = sorted(output.glob("manifest.*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


@cache
def encoded(model, path):
    return Tokenizer.from_pretrained(model).encode(path)


def check_complete(folder, output, model):
    """Every video once in the manifest and on disk, with the tokens that encode gives."""
    entries = {line["file"]: line for line in lines(output)}
    assert len(entries) == len(lines(output)) and entries.keys() == LENGTHS.keys()
    found = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.suffix == ".vft"}
    assert found == {f"{name}.vft" for name in LENGTHS}
    for name, frames in LENGTHS.items():
        data = (output / f"{name}.vft").read_bytes()
        tokens, entry = VideoTokens.from_bytes(data), entries[name]
        assert tokens.frames == entry["frames"] == frames and tokens.ids.numel() == entry["tokens"]
        assert entry["checksum"] == hashlib.sha256(data).hexdigest()
        want = encoded(model, folder / name)
        assert (tokens.fps, tokens.height, tokens.width, tokens.model) == (10, 40, 40, want.model)
        # packed with other chunks: a value between two levels may round otherwise
        assert (tokens.ids == want.ids).float().mean() > 0.99


@pytest.mark.parametrize("options", [[], ["--packed", "64", "--readers", "5"]])
def test_a_folder(tmp_path, folder, model, options, capsys):
    output = tmp_path / "new" / "out"
    assert cli.main(command(folder, output, model, *options)) == 0
    check_complete(folder, output, model)
    out, err = capsys.readouterr()
    assert out == f"{output}: 6 encoded, 0 there already, 0 failed, 1 left out\n"
    assert "vft: left out: notes.txt: not a video" in err


def test_a_second_run_keeps_what_is_finished(tmp_path, folder, model, capsys):
    def stamps():
        files = {name: (tmp_path / f"{name}.vft").stat() for name in LENGTHS}
        # a new file may get the number of one that is gone
        return {name: (found.st_ino, found.st_mtime_ns) for name, found in files.items()}

    assert cli.main(command(folder, tmp_path, model)) == 0
    before = stamps()
    assert cli.main(command(folder, tmp_path, model)) == 0
    assert stamps() == before
    assert "0 encoded, 6 there already" in capsys.readouterr().out
    # a damaged, a missing and an unlisted token file are made again, the others are not
    (tmp_path / "a.mp4.vft").write_bytes((tmp_path / "a.mp4.vft").read_bytes()[:-1])
    (tmp_path / "b.mkv.vft").unlink()
    part = tmp_path / "manifest.0.jsonl"
    kept = [line for line in part.read_text().splitlines() if '"same.mkv"' not in line]
    part.write_text("\n".join(kept) + '\n{"file": "same.mkv", "mod')
    assert cli.main(command(folder, tmp_path, model)) == 0
    assert "3 encoded, 3 there already" in capsys.readouterr().out
    assert {n for n, stamp in stamps().items() if stamp == before[n]} == LENGTHS.keys() - {"a.mp4", "b.mkv", "same.mkv"}
    check_complete(folder, tmp_path, model)


def test_other_registers_are_encoded_again(tmp_path, folder, model, capsys):
    assert cli.main(command(folder, tmp_path, model)) == 0
    whole = VideoTokens.load(tmp_path / "a.mp4.vft")
    assert cli.main(command(folder, tmp_path, model, "-k", "3")) == 0
    assert "6 encoded, 0 there" in capsys.readouterr().out
    assert torch.equal(VideoTokens.load(tmp_path / "a.mp4.vft").ids, whole.ids[:, :3])
    assert {line["registers"] for line in lines(tmp_path)} == {3}


def test_two_processes_share_the_list(tmp_path, folder, model, capsys):
    argv = [sys.executable, "-m", "vft.cli", *command(folder, tmp_path, model, "--device", "cpu")]
    ranks = [
        subprocess.Popen(argv, env=os.environ | {"RANK": str(r), "WORLD_SIZE": "2"}, stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    for rank in ranks:
        assert "3 encoded, 0 there already, 0 failed" in rank.communicate(timeout=120)[0]
        assert rank.returncode == 0
    names = sorted(LENGTHS)
    for rank in range(2):
        part = (tmp_path / f"manifest.{rank}.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["file"] for line in part) == names[rank::2]
    check_complete(folder, tmp_path, model)
    # another number of processes finds the lines of both
    assert cli.main(command(folder, tmp_path, model)) == 0
    assert "0 encoded, 6 there already" in capsys.readouterr().out
    check_complete(folder, tmp_path, model)


def test_a_bad_video_does_not_stop_the_run(tmp_path, folder, model, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    data = (folder / "same.mp4").read_bytes()
    (source / "1 cut.mp4").write_bytes(data[: len(data) // 2])
    (source / "2 text.mkv").write_text("hello")
    (source / "3 empty.mov").touch()
    (source / "4 good.mp4").write_bytes(data)
    for _ in range(2):
        assert cli.main(command(source, output, model)) == 1
        out, err = capsys.readouterr()
        assert out.endswith("3 failed\n")
        errors = [line for line in err.splitlines() if line.startswith("vft: error: ")]
        assert sorted(re.findall(r"error: (\d \w+)\.\w+: \w", "\n".join(errors))) == ["1 cut", "2 text", "3 empty"]
        entries = {line["file"]: line for line in lines(output)}
        assert len(lines(output)) == 4 and entries["4 good.mp4"]["frames"] == 33
        assert "damaged" in entries["1 cut.mp4"]["error"] and "empty" in entries["3 empty.mov"]["error"]
        assert [p.name for p in output.rglob("*.vft")] == ["4 good.mp4.vft"]
    # repaired, it is encoded
    (source / "3 empty.mov").write_bytes(data)
    assert cli.main(command(source, output, model)) == 1
    assert "1 encoded, 1 there already, 2 failed" in capsys.readouterr().out


def test_a_video_that_the_model_refuses_spoils_no_other(tmp_path, model):
    """A model without a working size takes frames as they are, up to its positional table."""
    torch.manual_seed(0)
    config = make_config(
        codec="linear", encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, registers=4, size=None
    )
    tokenizer = Tokenizer(parse_config(config), "free").eval()
    for name, frames, size in [("a.mp4", 18, 32), ("huge.mp4", 18, 640), ("small.mp4", 3, 8), ("z.mp4", 18, 48)]:
        clip_of(tmp_path / name, frames, size)
    summary = batch.encode_folder(tokenizer, tmp_path, tmp_path / "out", packed=16)
    assert summary == batch.Summary(encoded=2, skipped=0, failed=2)
    errors = {line["file"]: line["error"] for line in lines(tmp_path / "out") if "error" in line}
    assert errors.keys() == {"huge.mp4", "small.mp4"}
    assert "positional table" in errors["huge.mp4"] and "at least 16 pixels" in errors["small.mp4"]


def test_an_output_that_cannot_be_written_is_that_videos_error(tmp_path, folder, model, capsys):
    (tmp_path / "a.mp4.vft").mkdir()
    assert cli.main(command(folder, tmp_path, model)) == 1
    assert "5 encoded, 0 there already, 1 failed" in capsys.readouterr().out
    assert "regular file" in next(line for line in lines(tmp_path) if line["file"] == "a.mp4")["error"]


KILLED = """
import os, signal, sys
from vft import cli, files

replace, calls = os.replace, []

def killed(source, target):
    # the manifest's first, then one a token file
    calls.append(target)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

files.os.replace = killed
cli.main(sys.argv[1:])
"""


def test_resumes_after_a_kill(tmp_path, folder, model, capsys):
    argv = [sys.executable, "-c", KILLED, *command(folder, tmp_path, model, "--packed", "1", "--device", "cpu")]
    assert subprocess.run(argv, timeout=120).returncode == -9
    finished = {line["file"]: line["checksum"] for line in lines(tmp_path)}
    assert len(finished) == 2
    stamps = {name: (tmp_path / f"{name}.vft").stat().st_ino for name in finished}
    assert {p.name for p in tmp_path.rglob("*.vft")} == {f"{Path(name).name}.vft" for name in finished}
    assert cli.main(command(folder, tmp_path, model)) == 0
    assert "4 encoded, 2 there already" in capsys.readouterr().out
    assert stamps == {name: (tmp_path / f"{name}.vft").stat().st_ino for name in finished}
    check_complete(folder, tmp_path, model)


def test_an_interrupt_leaves_finished_videos_and_nothing_else(tmp_path, folder, model, monkeypatch, capsys):
    launch, calls = Tokenizer.launch_chunks, []

    def interrupted(self, chunks):
        calls.append(len(chunks))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return launch(self, chunks)

    threads = threading.active_count()
    monkeypatch.setattr(Tokenizer, "launch_chunks", interrupted)
    assert cli.main(command(folder, tmp_path, model, "--packed", "1")) == 130
    assert capsys.readouterr().err == "vft: interrupted\n"
    assert threading.active_count() == threads
    finished = {line["file"] for line in lines(tmp_path)}
    assert 0 < len(finished) < len(LENGTHS)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {f"{name}.vft" for name in finished} | {"manifest.0.jsonl", ".lock", ".lock.0"}
    monkeypatch.undo()
    assert cli.main(command(folder, tmp_path, model)) == 0
    check_complete(folder, tmp_path, model)


def test_memory_is_bounded(tmp_path, model, monkeypatch):
    for name in "abc":
        clip_of(tmp_path / f"{name}.mp4", 321)
    alive, most = weakref.WeakSet(), []
    cut = batch.cut_chunks

    def counted(*args):
        for chunk, new in cut(*args):
            alive.add(chunk)
            most.append(len(alive))
            yield chunk, new
            del chunk

    monkeypatch.setattr(batch, "cut_chunks", counted)
    summary = batch.encode_folder(Tokenizer.from_pretrained(model), tmp_path, tmp_path / "out", packed=4, readers=3)
    assert summary.encoded == 3 and len(most) == 60
    # a group, the queue, and what a reader holds: the chunk it hands over and the next
    assert max(most) <= 4 + 4 + 2 * 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK and WORLD_SIZE must be set together"),
        ({"WORLD_SIZE": "2"}, "RANK and WORLD_SIZE must be set together"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "0 <= RANK < WORLD_SIZE, got '2' and '2'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "0 <= RANK < WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "0 <= RANK < WORLD_SIZE"),
    ],
)
def test_wrong_ranks(tmp_path, folder, model, environment, message, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in failure(capsys, command(folder, tmp_path, model))


def test_more_processes_than_videos(tmp_path, folder, model, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert cli.main(command(folder, tmp_path, model)) == 0
    assert "0 encoded, 0 there already" in capsys.readouterr().out


def test_wrong_input(tmp_path, folder, model, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "no videos in it" in failure(capsys, command(tmp_path / "empty", tmp_path / "o", model))
    assert "no such folder" in failure(capsys, command(tmp_path / "none", tmp_path / "o", model))
    assert "not a folder" in failure(capsys, command(folder / "a.mp4", tmp_path / "o", model))
    assert "must be a folder" in failure(capsys, command(folder, tmp_path / "file", model))
    assert "add --batch" in failure(capsys, ["encode", folder, "-o", tmp_path / "a.vft", "--model", model])
    assert "nosuch" in failure(capsys, command(folder, tmp_path / "o", "nosuch"))
    assert "keep must be between 1 and 8" in failure(capsys, command(folder, tmp_path / "o", model, "-k", "9"))
    assert "at least 1" in failure(capsys, command(folder, tmp_path / "o", model, "--packed", "0"))
    assert not (tmp_path / "o").exists()


def failure(capsys, argv):
    """Run a command that must fail; return its one line on stderr."""
    assert cli.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"vft: error: [^\n]+\n", err), err
    return err


@pytest.mark.parametrize("wrong", [{"packed": 0}, {"readers": 0}, {"keep": 0}, {"rank": 1}, {"rank": -1}])
def test_wrong_numbers(tmp_path, folder, model, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        batch.encode_folder(Tokenizer.from_pretrained(model), folder, tmp_path, **wrong)
