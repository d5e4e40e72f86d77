import os
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vft import metrics, video
from vft.demo import CLIP
from vft.files import check_output, replacing


def moving(frames=5, height=32, width=48):
    """A bright square that moves over a smooth background: uint8 [T, H, W, 3]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    out = torch.stack([y * 255 // height, x * 255 // width, torch.full_like(x, 90)], -1).repeat(frames, 1, 1, 1)
    for t in range(frames):
        out[t, 2 : 2 + height // 3, t : t + width // 3] = torch.tensor([230, 210, 40])
    return out.to(torch.uint8)


def encode_raw(path, images, codec="ffv1", pix_fmt="bgra", rate=8, source="rgb24", rotation=None):
    """Write an MKV or MP4 by PyAV alone, in pixel formats that write_video does not use."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format=source).reformat(format=pix_fmt)))
        container.mux(stream.encode())


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize(("frames", "fps"), [(1, 8), (2, 29.97002997002997), (17, 25), (3, 0.5)])
def test_write_then_read_keeps_count_rate_and_picture(tmp_path, suffix, frames, fps):
    clip, path = moving(frames), tmp_path / f"clip{suffix}"
    assert video.write_video(path, clip, fps) == frames
    back = video.read_video(path)
    assert back.frames.dtype == torch.uint8 and back.frames.shape == clip.shape
    assert back.fps == pytest.approx(fps, rel=1e-9)
    assert (back.height, back.width) == (32, 48)
    # 4:2:0 blurs the colour edges of the square
    assert metrics.frames_psnr(back.frames, clip) > 25


def test_gif_keeps_frames_that_do_not_change(tmp_path):
    clip = moving(4)
    clip = torch.cat([clip, clip[-1:].repeat(3, 1, 1, 1)])[:, :31, :47]
    video.write_video(tmp_path / "a.gif", clip, 10)
    back = video.read_video(tmp_path / "a.gif")
    assert back.frames.shape == clip.shape and back.fps == 10
    assert metrics.frames_psnr(back.frames, clip) > 25


def test_odd_sizes_are_padded_by_their_last_row_and_column(tmp_path):
    clip = moving(2, 33, 47)
    video.write_video(tmp_path / "odd.mp4", clip, 8, quality=0)
    back = video.read_video(tmp_path / "odd.mp4").frames
    assert back.shape == (2, 34, 48, 3)
    padded = np.pad(clip.numpy(), ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    assert metrics.frames_psnr(back, torch.from_numpy(padded)) > 25


def test_mpeg4_where_there_is_no_libx264(tmp_path, monkeypatch):
    monkeypatch.setattr(av.codec, "codecs_available", {"mpeg4"})
    clip, path = moving(5), tmp_path / "a.mp4"
    video.write_video(path, clip, 12)
    assert video.probe_video(path).codec == "mpeg4"
    back = video.read_video(path)
    assert back.fps == 12 and metrics.frames_psnr(back.frames, clip) > 25


def test_pieces_and_quality(tmp_path):
    clip = torch.randint(256, (9, 64, 64, 3), dtype=torch.uint8)
    assert video.write_video(tmp_path / "good.mp4", iter(clip.split(4)), 8, quality=10) == 9
    video.write_video(tmp_path / "small.mp4", clip, 8, quality=45)
    assert len(video.read_video(tmp_path / "good.mp4").frames) == 9
    assert os.path.getsize(tmp_path / "small.mp4") < os.path.getsize(tmp_path / "good.mp4") / 2


@pytest.mark.parametrize("pix_fmt", ["bgra", "yuv420p", "yuv444p10le"])
def test_reads_odd_sizes_alpha_and_more_than_8_bits(tmp_path, pix_fmt):
    clip = moving(3, 21, 37)
    encode_raw(tmp_path / "a.mkv", list(clip.numpy()), pix_fmt=pix_fmt, rate=Fraction(30000, 1001))
    back = video.read_video(tmp_path / "a.mkv")
    assert back.frames.shape == (3, 21, 37, 3) and back.fps == 30000 / 1001
    assert metrics.frames_psnr(back.frames, clip) > (80 if pix_fmt == "bgra" else 25)


def test_gray_becomes_rgb(tmp_path):
    gray = moving(2).numpy()[..., 0].copy()
    encode_raw(tmp_path / "a.mkv", list(gray), pix_fmt="gray", source="gray")
    back = video.read_video(tmp_path / "a.mkv").frames
    assert torch.equal(back[..., 0], back[..., 2])
    assert np.abs(back[..., 1].numpy().astype(int) - gray).max() <= 1


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_metadata_is_applied(tmp_path, degrees):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write the rotation")
    clip = moving(2)
    encode_raw(tmp_path / "a.mp4", list(clip.numpy()), "libx264", "yuv420p", rotation=degrees)
    back = video.read_video(tmp_path / "a.mp4")
    upright = torch.rot90(clip, degrees // 90, (1, 2))
    assert (back.height, back.width) == tuple(upright.shape[1:3])
    assert metrics.frames_psnr(back.frames, upright) > 25


def test_size_and_max_frames_are_those_of_fit(tmp_path):
    clip = moving(6, 40, 80)
    encode_raw(tmp_path / "a.mkv", list(clip.numpy()))
    back = video.read_video(tmp_path / "a.mkv", size=32, max_frames=4)
    assert torch.equal(back.frames, video.fit(clip, 32)[:4])
    assert (back.height, back.width) == (40, 80)


def test_a_still_picture_is_one_frame(tmp_path):
    video.contact_sheet([("a", moving(1))]).save(tmp_path / "a.png")
    assert len(video.read_video(tmp_path / "a.png").frames) == 1


def test_fit_takes_the_centred_square():
    clip = torch.zeros(2, 32, 96, 3, dtype=torch.uint8)
    clip[:, :, 32:64] = 200
    assert video.fit(clip, 16).unique().tolist() == [200]
    assert video.fit(clip.transpose(1, 2), 64).shape == (2, 64, 64, 3)
    same = moving(2, 32, 32)
    assert torch.equal(video.fit(same, 32), same)


def test_preprocess_and_to_uint8_are_inverse():
    clip = torch.arange(256, dtype=torch.uint8).repeat(3)[: 16 * 16 * 3].view(1, 16, 16, 3)
    model = video.preprocess(clip)
    assert model.shape == (3, 1, 16, 16) and model.dtype == torch.float32
    assert model.min() == -1 and model.max() == 1
    assert torch.equal(video.to_uint8(model), clip)
    assert torch.equal(video.to_uint8(model[None] * 3), video.to_uint8((model * 3).clamp(-1, 1)))
    # without a size: cropped around the centre to multiples of 16
    assert torch.equal(video.preprocess(moving(2, 33, 50)), video.preprocess(moving(2, 33, 50)[:, :32, 1:49]))
    elsewhere = video.preprocess(moving(2, 33, 50), 32, torch.device("meta"))
    assert elsewhere.device.type == "meta" and elsewhere.shape == (3, 2, 32, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: video.fit(moving(), 40), "multiple of 16, got 40"),
        (lambda: video.fit(moving().float(), 32), r"uint8 \[T, H, W, 3\], got torch.float32"),
        (lambda: video.preprocess(moving(0), 32), "at least one frame"),
        (lambda: video.preprocess(moving(2, 8, 32)), "at least 16 pixels"),
        (lambda: video.to_uint8(torch.full((3, 1, 4, 4), float("nan"))), "free of NaN"),
        (lambda: video.to_uint8(torch.zeros(2, 3, 1, 4, 4)), "must have shape"),
        (lambda: metrics.frames_psnr(moving(2), moving(3)), "reference's shape"),
        (lambda: video.contact_sheet([]), "at least 1"),
        (lambda: video.read_video(CLIP, max_frames=0), "max_frames must be at least 1"),
        (lambda: video.read_video(CLIP, size=8), "size must be"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "frames", "options", "message"),
    [
        ("a.txt", moving(), {}, "must end in .mp4"),
        ("a.mp4", moving(0), {}, "at least one frame"),
        ("a.mp4", [], {}, "at least one frame"),
        ("a.mp4", [moving(2), moving(2, 16, 16)], {}, "keep one size"),
        ("a.mp4", moving(), {"fps": float("nan")}, "fps must be"),
        ("a.mp4", moving(), {"fps": 0}, "fps must be"),
        ("a.mp4", moving(), {"quality": 99}, "quality must be"),
    ],
)
def test_write_video_refuses_and_leaves_nothing(tmp_path, name, frames, options, message):
    with pytest.raises(ValueError, match=message):
        video.write_video(tmp_path / name, frames, **{"fps": 8, **options})
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def pieces():
        yield moving(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.write_video(path, pieces(), 8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == b"old"


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, message in [
        (tmp_path / "missing" / "a.mp4", "does not exist"),
        (tmp_path / "file" / "a.mp4", "does not exist"),
        (tmp_path, "regular file, got a folder"),
        ("/dev/null", "regular file, got a device"),
    ]:
        with pytest.raises(OSError, match=message):
            check_output(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="not writable"):
        check_output(tmp_path / "a.mp4")


def test_replacing_follows_a_link(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2


def index_first(path):
    """The shipped clip's first frames again, with the index before the frames, so that a cut file can be opened."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 128
        stream.pix_fmt = "yuv420p"
        for image in video.read_video(CLIP, max_frames=9).frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, part):
    for name, data in [("end.mp4", CLIP.read_bytes()), ("start.mp4", index_first(tmp_path / "whole.mp4"))]:
        path = tmp_path / name
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(video.VideoError, match=name):
            video.read_video(path, strict=True)
    path.write_bytes(data)
    assert len(video.read_video(path).frames) == 9


def test_files_that_are_not_videos(tmp_path):
    (tmp_path / "random.mp4").write_bytes(np.random.default_rng(0).bytes(20000))
    (tmp_path / "poem.txt").write_text("shall I compare thee\n" * 100)
    # a playlist would make FFmpeg open what it names
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height = stream.width = 16
        container.start_encoding()
    for name, message in [
        ("random.mp4", "not a video"),
        ("poem.txt", "not a video"),
        ("list.m3u8", "not a video"),
        ("sound.wav", "no video stream"),
        ("none.avi", "no frames"),
        ("missing.mp4", "no such file"),
        (".", "not a file"),
    ]:
        with pytest.raises(video.VideoError, match=message):
            video.read_video(tmp_path / name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 44378), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))
def test_damaged_bytes_give_frames_or_a_video_error(tmp_path, damage):
    data = bytearray(CLIP.read_bytes())
    for position, patch in damage:
        data[position : position + len(patch)] = patch
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    try:
        clip = video.read_video(path, max_frames=3)
    except video.VideoError as error:
        assert "damaged.mp4" in str(error)
    else:
        assert clip.frames.shape[3] == 3 and len(clip.frames) >= 1


def test_contact_sheet_has_a_row_for_each_video():
    short, long = moving(3, 32, 32), moving(20, 32, 32)
    one = video.contact_sheet([("source", long)], columns=4, tile=64)
    two = video.contact_sheet([("source", long), ("k = 1", short)], columns=4, tile=64)
    assert two.width == one.width and two.height > 2 * 64
    # the last column holds the last frame of the long video and nothing of the short one
    assert two.crop((two.width - 34, 34, two.width - 33, 35)).getcolors() != [(1, (255, 255, 255))]
    assert two.crop((two.width - 34, 100, two.width - 33, 101)).getcolors() == [(1, (255, 255, 255))]


def test_the_shipped_clip():
    info = video.probe_video(CLIP)
    assert (info.codec, info.height, info.width, info.frames, info.fps) == ("h264", 128, 128, 33, 8)
    assert (CLIP.parent / "ATTRIBUTION.md").is_file()
