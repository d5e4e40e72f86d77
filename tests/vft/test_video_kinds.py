"""Each kind of video file that the world sends, written by PyAV: shape, time, colour and damage."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from video_files import KINDS, copied, encode, picture, ramp, write_kind

from vft import video
from vft.metrics import frames_psnr
from vft.video import hdr
from vft.video.container import is_cut
from vft.video.timing import on_grid, steady


def apart(a, b) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.mark.parametrize("name", KINDS)
def test_containers_and_codecs(tmp_path, name):
    back = video.read_video(write_kind(tmp_path, name))
    assert back.frames.shape == (10, 48, 64, 3) and back.fps == 25 and back.warnings == ()
    # the encoder of GIF mixes eight levels a channel
    gray = back.frames.float().mean((1, 2, 3)) if name == "a.gif" else back.frames
    assert apart(gray.round(), ramp(10)[:, 0, 0, 0] if name == "a.gif" else ramp(10)) <= 6


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("x", [1, -1])
@pytest.mark.parametrize("y", [1, -1])
def test_the_eight_display_matrices(tmp_path, swap, x, y):
    """A pixel at (column, row) is shown at (a column + c row, b column + d row), up to a shift."""
    a, b, c, d = (0, y, x, 0) if swap else (x, 0, 0, y)
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    image = picture(48, 64)
    path = encode(tmp_path / "a.mp4", [image] * 2, setup=lambda s: s.set_display_matrix(matrix), options={"crf": "4"})
    shown = image.swapaxes(0, 1) if swap else image
    shown = shown[:: y or 1, :: x or 1]
    back = video.read_video(path)
    assert (back.height, back.width) == shown.shape[:2]
    assert frames_psnr(back.frames[0], torch.from_numpy(shown.copy())) > 30
    assert frames_psnr(back.frames[0], torch.from_numpy(shown[::-1].copy())) < 15


@pytest.mark.parametrize("aspect", [Fraction(3, 2), Fraction(2, 3), Fraction(1000)])
def test_pixel_aspects(tmp_path, aspect):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    back = video.read_video(encode(tmp_path / "a.mp4", [picture()] * 2, setup=setup))
    # an aspect of 1000 is a fault
    assert (back.height, back.width) == (48, {Fraction(3, 2): 96, Fraction(2, 3): 42}.get(aspect, 64))


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv422p12le", "gbrp12le", "gray10le"])
@pytest.mark.parametrize("size", [(48, 64), (21, 37)])
def test_more_bits_and_odd_sizes(tmp_path, pix_fmt, size):
    image = picture(*size)
    back = video.read_video(encode(tmp_path / "a.mkv", [image] * 2, "ffv1", pix_fmt)).frames
    if pix_fmt == "gray10le":
        image = np.repeat((image @ [0.299, 0.587, 0.114])[..., None], 3, -1).round().astype(np.uint8)
    assert back.shape[1:3] == size and frames_psnr(back[0], torch.from_numpy(image)) > 35


@pytest.mark.parametrize("full", [False, True])
def test_full_and_limited_range(tmp_path, full):
    def tag(frame):
        frame = frame.reformat(format="yuv444p", dst_color_range="JPEG" if full else "MPEG")
        assert np.frombuffer(frame.planes[0], np.uint8).min() == (0 if full else 16)
        return frame

    def setup(stream):
        stream.codec_context.color_range = 2 if full else 1

    black_and_white = np.repeat(np.array([0, 255], np.uint8), 32)[None, :, None].repeat(48, 0).repeat(3, 2)
    path = tmp_path / "a.mkv"
    encode(path, [black_and_white] * 2, "ffv1", "yuv444p", setup=setup, convert=tag)
    assert apart(video.read_video(path).frames[0], black_and_white) <= 1


def test_untagged_hd_counts_as_bt709(tmp_path):
    red = np.zeros((720, 1280, 3), np.uint8) + np.array([200, 40, 30], np.uint8)

    def untagged(_):
        frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.colorspace = 2
        return frame

    path = encode(tmp_path / "a.mkv", [red] * 2, "ffv1", "yuv420p", convert=untagged)
    assert apart(video.read_video(path).frames[0], red) <= 2


def test_transparent_parts_lie_over_black(tmp_path):
    image = np.dstack([picture(), np.full((48, 64), 255, np.uint8)])
    image[:16, :, 3], image[16:32, :, 3] = 0, 128

    def transparent(_):
        return av.VideoFrame.from_ndarray(image, format="rgba").reformat(format="bgra")

    path = encode(tmp_path / "a.mkv", [image[..., :3]] * 2, "ffv1", "bgra", convert=transparent)
    want = image[..., :3] * (image[..., 3:] / 255)
    back = video.read_video(path).frames[0].numpy()
    assert np.abs(back - want).max() <= 1 and np.array_equal(back[32:], image[32:, :, :3])


def test_a_size_that_changes_is_scaled_to_the_first(tmp_path):
    parts = [encode(tmp_path / f"{h}.h264", [picture(h, w)] * 5, container="h264") for h, w in ((48, 64), (96, 128))]
    path = tmp_path / "a.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    back = video.read_video(path)
    assert back.frames.shape == (10, 48, 64, 3)
    for frame in back.frames:
        assert frames_psnr(frame, torch.from_numpy(picture(48, 64))) > 25


def several(path, *streams):
    """A file with one stream for each (gray level, height, disposition)."""
    with av.open(str(path), "w") as output:
        made = []
        for _, height, disposition in streams:
            stream = output.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt, stream.disposition = height, 64, "yuv420p", disposition
            made.append(stream)
        for _ in range(3):
            for stream, (level, height, _) in zip(made, streams, strict=True):
                image = np.full((height, 64, 3), level, np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in made:
            output.mux(stream.encode())
    return path


def test_the_default_stream_then_the_largest(tmp_path):
    flags = av.stream.Disposition
    none, default = flags(0), flags.default
    for number, (streams, level) in enumerate([
        ([(50, 48, none), (100, 96, none), (150, 64, none)], 100),
        ([(50, 48, none), (100, 96, none), (150, 64, default)], 150),
    ]):  # fmt: skip
        frames = video.read_video(several(tmp_path / f"{number}.mkv", *streams)).frames
        assert abs(int(frames.float().mean()) - level) <= 2, number


def test_an_attached_picture_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        cover, stream = output.add_stream("mjpeg", rate=10), output.add_stream("libx264", rate=10)
        cover.height, cover.width, cover.pix_fmt = 96, 128, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        output.mux(cover.encode(av.VideoFrame.from_ndarray(picture(96, 128), format="rgb24")))
        for image in ramp(5):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        output.mux(stream.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert video.read_video(path).frames.shape == (5, 48, 64, 3)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.sampled_from([8, 25, 30, Fraction(30000, 1001)]))
@settings(max_examples=40, deadline=None)
def test_any_timestamps_fall_on_the_grid(intervals, rate):
    """Point k of the grid shows the last frame whose time rounds to k or less; the last one keeps its duration."""
    time_base, rate = Fraction(1, 90), Fraction(rate)
    times = [sum(intervals[:i]) for i in range(len(intervals))]

    def frames():
        for index, (pts, duration) in enumerate(zip(times, intervals, strict=True)):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), index, np.uint8), format="gray")
            frame.pts, frame.duration, frame.time_base = pts + 77, duration, time_base
            yield frame

    notes = []
    shown = [f.to_ndarray()[0, 0] for f in on_grid(steady(frames(), time_base, rate, notes.append), time_base, rate)]
    nearest = lambda ticks: int(ticks * time_base * rate + Fraction(1, 2))  # noqa: E731
    want = [
        max(i for i, pts in enumerate(times) if nearest(pts) <= k) for k in range(nearest(times[-1] + intervals[-1]))
    ]
    assert notes == [] and (shown == want if want else shown == [len(intervals) - 1])


def test_timestamps_that_jump_are_closed(tmp_path):
    """Two recordings in one file: back to the beginning, or an hour on."""
    part = encode(tmp_path / "a.ts", ramp(12), options={"bf": "0"}).read_bytes()
    later = encode(tmp_path / "b.ts", ramp(12), options={"bf": "0"}, container_options={"output_ts_offset": "3600"})
    for second in (part, later.read_bytes()):
        path = tmp_path / "both.ts"
        path.write_bytes(part + second)
        with pytest.warns(video.VideoWarning, match=r"both\.ts: its timestamps jump 1 times"):
            back = video.read_video(path)
        assert back.fps == 25 and apart(back.frames, np.concatenate([ramp(12)] * 2)) <= 6


def test_negative_timestamps_and_edit_lists(tmp_path):
    """B-frames make an MP4 begin with an edit; a first timestamp below 0 is time 0 all the same."""
    path = encode(tmp_path / "a.mp4", ramp(12), options={"bf": "3"})
    assert b"elst" in path.read_bytes()
    assert apart(video.read_video(path).frames, ramp(12)) <= 6
    early = copied(path, tmp_path / "b.mkv")
    with av.open(str(path)) as old, av.open(str(tmp_path / "c.ts"), "w", options={"output_ts_offset": "-3"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    for name in (early, tmp_path / "c.ts"):
        back = video.read_video(name)
        assert len(back.frames) == 12 and apart(back.frames, ramp(12)) <= 6


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.h264", "a.flv"])
def test_one_and_two_frames(tmp_path, name, frames):
    assert len(video.read_video(write_kind(tmp_path, name, frames)).frames) == frames


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.flv", "a.mpg"])
def test_a_file_cut_short_gives_the_frames_that_are_there(tmp_path, name):
    codec, pix_fmt, container = KINDS[name]
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    index_first = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = encode(tmp_path / name, noise, codec, pix_fmt, container=container, container_options=index_first)
    data = path.read_bytes()
    whole = video.read_video(path).frames
    path.write_bytes(data[: len(data) * 6 // 10])
    # these formats state how long they are
    states = name in ("a.mp4", "a.mkv", "a.avi")
    with av.open(str(path)) as opened:
        assert is_cut(str(path), opened.format.name) == states
    if states:
        with pytest.warns(video.VideoWarning, match=rf"{name}: .*behind its cut end lost$") as caught:
            back = video.read_video(path)
        assert len(caught) == 1
        with pytest.raises(video.VideoError, match=f"{name}: damaged"):
            video.read_video(path, strict=True)
    else:
        back = video.read_video(path)
    assert 15 <= len(back.frames) < 35
    count = len(back.frames) - 4
    assert torch.equal(back.frames[:count], whole[:count])


@pytest.mark.parametrize(("transfer", "grey"), [(hdr.PQ, 0.5806), (hdr.HLG, 0.7500)])
def test_reference_white_of_hdr(tmp_path, transfer, grey):
    """203 nits in PQ and HLG (BT.2408: 58% and 75%) are bright but not the brightest; black and colours stay."""
    signal = np.array([[0.0] * 3, [grey] * 3, [1.0] * 3])
    black, white, peak = hdr.to_sdr(signal, transfer, 9)
    assert black.max() < 1e-3 and 0.94 < white.min() <= white.max() < 0.97 and peak.min() > 0.99
    # half of the reference white lies below the shoulder: sRGB of 0.5
    half = {hdr.PQ: 0.5090, hdr.HLG: 0.6325}[transfer]
    assert np.abs(hdr.to_sdr(np.full((1, 3), half), transfer, 9) - 0.735).max() < 0.02


def test_the_table_is_the_formula(tmp_path):
    """A PQ file of many colours through the filter, against the formula."""
    signal = np.random.default_rng(0).uniform(0, 0.75, (48, 64, 3))
    # smooth over the picture, or the table's interpolation is all that is measured
    signal = np.sort(np.sort(signal, 0), 1)
    coded = np.round(signal * 65535).astype(np.uint16)

    def tag(frame):
        frame = av.VideoFrame.from_ndarray(coded, format="rgb48le").reformat(format="gbrp16le")
        frame.color_trc, frame.color_primaries = 16, 9
        return frame

    def setup(stream):
        stream.codec_context.color_trc, stream.codec_context.color_primaries = 16, 9

    path = encode(tmp_path / "a.mkv", [picture()] * 2, "ffv1", "gbrp16le", setup=setup, convert=tag)
    want = np.round(255 * hdr.to_sdr(signal, hdr.PQ, 9))
    error = np.abs(video.read_video(path).frames[0].numpy() - want)
    assert error.mean() < 1 and error.max() <= 8


def test_sizes_beyond_reason_are_refused(tmp_path):
    data = bytearray(encode(tmp_path / "a.mjpeg", [picture()] * 2, "mjpeg", "yuvj420p", container="mjpeg").read_bytes())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = b"\xff\xdc\xff\xdc"
    (tmp_path / "a.mjpeg").write_bytes(data)
    with pytest.raises(video.VideoError, match=r"a\.mjpeg"):
        video.read_video(tmp_path / "a.mjpeg", strict=True)
