"""``vft encode`` on the files of a folder: what counts as a video, what has changed, what was lost, and its sound."""

import json
import os

import av
import numpy as np
import pytest
import torch
from video_files import REPORTS, animated, encode, picture, ramp, with_sound, write_kind

from vft import Tokenizer, batch, cli, video
from vft.config import make_config, parse_config
from vft.scan import scan
from vft.tokens import VideoTokens
from vft.video.audio import save_audio, sidecar


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    config = make_config(
        codec="linear", encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, registers=4, size=32
    )
    torch.manual_seed(0)
    Tokenizer(parse_config(config), "small").save(path)
    return str(path)


def rows(output):
    lines = (output / "manifest.0.jsonl").read_text().splitlines()
    return {row["file"]: row for row in map(json.loads, lines)}


def run(source, output, model, *options):
    return cli.main(["encode", str(source), "-o", str(output), "--batch", "--model", model, *options])


def test_what_is_a_video_is_asked_of_ffmpeg(tmp_path):
    for name in ("a.h264", "a.hevc", "a.mjpeg", "a.vob", "a.mxf", "a.asf", "a.f4v", "a.divx", "a.mts", "a.gif"):
        write_kind(tmp_path, name, 3)
    write_kind(tmp_path, "a.mp4", 3).rename(tmp_path / "no suffix")
    animated(tmp_path / "moving.webp", ramp(3), [100] * 3)
    animated(tmp_path / "moving.apng", ramp(3), [100] * 3)
    (tmp_path / "damaged.mp4").write_text("hello")
    left_out = {"notes.txt": "not a video", "still.png": "a still picture", "a.mp4.part": "an unfinished download"}
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "still.png").write_bytes((REPORTS / "hdr_src.png").read_bytes())
    (tmp_path / "a.mp4.part").write_bytes((REPORTS / "sar.mp4").read_bytes())
    for hidden in (".a.mp4", ".folder/a.mp4", "a.vft", "a.vft.mka", "manifest.0.jsonl"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes((REPORTS / "sar.mp4").read_bytes())
    found = scan(tmp_path)
    assert found.videos == sorted([
        "a.h264", "a.hevc", "a.mjpeg", "a.vob", "a.mxf", "a.asf", "a.f4v", "a.divx", "a.mts", "a.gif", "no suffix",
        "moving.webp", "moving.apng", "damaged.mp4",
    ])  # fmt: skip
    assert found.left_out.keys() == left_out.keys()
    assert all(found.left_out[name].startswith(reason) for name, reason in left_out.items())


def test_what_is_left_out_is_counted_and_named(tmp_path, model, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write_kind(source, "a.mp4", 3)
    for number in range(22):
        (source / f"{number:02}.txt").write_text("hello")
    assert run(source, output, model) == 0
    out, err = capsys.readouterr()
    assert out.endswith("1 encoded, 0 there already, 0 failed, 22 left out\n")
    named = [line for line in err.splitlines() if line.startswith("vft: left out: ")]
    assert len(named) == 21 and "00.txt: not a video" in named[0] and named[-1].endswith("2 more")


def test_a_changed_source_is_encoded_again(tmp_path, model, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    path = write_kind(source, "a.mp4", 3)
    stamp = path.stat()
    expect = [("1 encoded", []), ("1 there already", [])]
    for words, options in expect:
        assert run(source, output, model, *options) == 0 and words in capsys.readouterr().out
    # a new time alone; the same contents by checksum, which the first run with it must note
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))
    assert run(source, output, model, "--checksum") == 0 and "1 encoded" in capsys.readouterr().out
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 2 * 10**9))
    assert run(source, output, model, "--checksum") == 0 and "1 there already" in capsys.readouterr().out
    assert run(source, output, model) == 0 and "1 encoded" in capsys.readouterr().out
    # other contents of the same size and time
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    now = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(now.st_atime_ns, now.st_mtime_ns))
    assert run(source, output, model) == 0 and "1 there already" in capsys.readouterr().out
    assert run(source, output, model, "--checksum") == 0 and "1 encoded" in capsys.readouterr().out
    facts = rows(output)["a.mp4"]["source"]
    assert facts.keys() == {"bytes", "modified", "checksum"} and facts["bytes"] == len(data)
    # other frames of it
    assert run(source, output, model, "--fps", "5") == 0 and "1 encoded" in capsys.readouterr().out
    assert VideoTokens.load(output / "a.mp4.vft").fps == 5 and rows(output)["a.mp4"]["asked"] == {"fps": 5.0}
    assert run(source, output, model, "--fps", "5") == 0 and "1 there already" in capsys.readouterr().out


def test_a_damaged_video_is_used_and_noted_or_refused(tmp_path, model, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "bad.mp4").write_bytes((REPORTS / "one_bad_packet.mp4").read_bytes())
    assert run(source, output, model) == 0
    assert "vft: warning: bad.mp4: 1 damaged packet lost\n" in capsys.readouterr().err
    row = rows(output)["bad.mp4"]
    assert row["frames"] == 50 and row["warnings"] == ["1 damaged packet lost"]
    assert run(source, output, model, "--strict") == 1
    assert "1 failed" in capsys.readouterr().out and "damaged" in rows(output)["bad.mp4"]["error"]
    one = ["encode", str(source / "bad.mp4"), "-o", str(tmp_path / "a.vft"), "--model", model]
    assert cli.main(one) == 0
    assert capsys.readouterr().err == f"vft: warning: {source / 'bad.mp4'}: 1 damaged packet lost\n"
    assert cli.main([*one, "--strict"]) == 2
    assert "bad.mp4: damaged (" in capsys.readouterr().err


def packets(path):
    with av.open(str(path)) as container:
        return [(bytes(p), float(p.pts * p.time_base)) for p in container.demux(audio=0) if p.size]


def test_sound_goes_beside_the_tokens_and_back(tmp_path, model, capsys):
    source, tokens = with_sound(tmp_path / "in.mp4"), tmp_path / "a.vft"
    one = ["encode", str(source), "-o", str(tokens), "--model", model]
    assert cli.main(one) == 0
    assert "in.mp4: its audio is left out (--audio copy keeps it)\n" in capsys.readouterr().err
    assert not sidecar(tokens).exists()
    own = sidecar(tokens)
    tokens.rename(tmp_path / "moved.vft")
    own.write_text("mine")
    assert cli.main([*one, "--audio", "copy"]) == 2 and "exists and was not named: remove it" in capsys.readouterr().err
    assert own.read_text() == "mine"
    own.unlink()
    assert cli.main([*one, "--audio", "copy"]) == 0 and capsys.readouterr().err == ""
    decode = ["decode", str(tokens), "--model", model, "--steps", "1", "--audio", "copy", "-o"]
    want = packets(source)
    for name in ("b.mp4", "b.mkv"):
        assert cli.main([*decode, str(tmp_path / name)]) == 0
        back = packets(tmp_path / name)
        assert [data for data, _ in back] == [data for data, _ in want]
        # Matroska counts in milliseconds
        assert np.abs(np.array([t for _, t in back]) - [t for _, t in want]).max() < 0.03
        assert len(video.read_video(tmp_path / name).frames) == 10
    capsys.readouterr()
    assert cli.main([*decode, str(tmp_path / "b.gif")]) == 2
    assert "a GIF, which has no sound" in capsys.readouterr().err
    sidecar(tokens).unlink()
    assert cli.main([*decode, str(tmp_path / "b.mp4")]) == 2
    assert "a.vft.mka: no such file" in capsys.readouterr().err


def test_sound_of_a_folder(tmp_path, model, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    with_sound(source / "a.mp4")
    encode(source / "b.mp4", [picture()] * 3)
    assert run(source, output, model) == 0
    assert "vft: warning: 1 audio tracks are left out" in capsys.readouterr().err
    assert run(source, output, model, "--audio", "copy") == 0
    out, err = capsys.readouterr()
    assert "2 encoded" in out and err == ""
    assert packets(output / "a.mp4.vft.mka") and not (output / "b.mp4.vft.mka").exists()
    assert run(source, output, model, "--audio", "copy") == 0 and "2 there already" in capsys.readouterr().out


def test_a_video_without_sound_has_no_sidecar(tmp_path):
    path = encode(tmp_path / "a.mp4", [picture()] * 3)
    sidecar(path).write_bytes(b"old")
    assert save_audio(path, path) is None and not sidecar(path).exists()
    with pytest.raises(video.VideoError, match="no audio track in it"):
        video.write_video(tmp_path / "b.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), 8, audio=path)
    assert not (tmp_path / "b.mp4").exists()


def test_short_clips_cost_what_they_hold(tmp_path, model):
    tokenizer = Tokenizer.from_pretrained(model)
    for frames, latent in ((1, 1), (2, 2), (5, 2), (6, 3), (17, 5), (25, 7), (33, 9)):
        path = encode(tmp_path / f"{frames}.mp4", np.roll(ramp(frames), 7, 1) if frames < 12 else [
            np.roll(picture(), 3 * i, 1) for i in range(frames)
        ])  # fmt: skip
        tokens = tokenizer.encode(path)
        assert tokens.latent_frames == latent and tokens.frames == frames
        assert tokenizer.decode(tokens, steps=1, guidance=None).shape == (1, 3, frames, 32, 32)


def test_a_summary_counts(tmp_path, model):
    write_kind(tmp_path, "a.mp4", 3)
    summary = batch.encode_folder(Tokenizer.from_pretrained(model), tmp_path, tmp_path / "out")
    assert summary == batch.Summary(encoded=1, skipped=0, failed=0, left_out={}, silent=0)
