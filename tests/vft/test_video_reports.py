"""Files after public bug reports, each named for its fault: what their frames must be."""

import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import REPORTS, animated, copied, encode, picture, ramp

from vft import video
from vft.metrics import frames_psnr


def decoded(name: str) -> list[av.VideoFrame]:
    with av.open(str(REPORTS / name)) as container:
        return list(container.decode(video=0))


def filtered(name: str, *filters: str) -> np.ndarray:
    """The frames of a file after a graph of FFmpeg's filters, as RGB [T, H, W, 3]."""
    frames, out = decoded(name), []
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(template=frames[0], time_base=frames[0].time_base)]
    for text in (*filters, "format=rgb24"):
        kind, _, options = text.partition("=")
        nodes.append(graph.add(kind, options))
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    for frame in [*frames, None]:
        graph.vpush(frame)
        while True:
            try:
                out.append(graph.vpull().to_ndarray())
            except (BlockingIOError, EOFError):
                break
    return np.stack(out)


def apart(a, b) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.mark.parametrize("name", ["vfr.mp4", "live.webm"])
def test_variable_rate_is_sampled_by_timestamps(name):
    back = video.read_video(REPORTS / name)
    source = decoded(name)
    assert back.fps == 30
    # the last frame is shown from 4.5 s on, for one interval
    assert abs(len(back.frames) / 30 - (4.5 + 1 / 30)) <= 1 / 30
    for seconds in (0.2, 1.0, 1.5, 2.4, 3.0, 4.4):
        shown = [frame for frame in source if frame.time <= seconds + 0.5 / 30][-1]
        assert apart(back.frames[round(30 * seconds)], shown.to_ndarray(format="rgb24")) <= 1
    assert apart(back.frames, filtered(name, "fps=30")) <= 1


def test_the_rate_can_be_chosen():
    for fps in (7.5, 60, 29.97):
        back = video.read_video(REPORTS / "vfr.mp4", fps=fps)
        assert back.fps == pytest.approx(fps) and abs(len(back.frames) / fps - 4.533) <= 1 / fps
        assert apart(back.frames, filtered("vfr.mp4", f"fps={fps}")) <= 1
    for wrong in (0, -1, float("nan"), 2000):
        with pytest.raises(ValueError, match=r"fps must be between 0\.01 and 1000"):
            video.read_video(REPORTS / "vfr.mp4", fps=wrong)


def test_reading_from_the_middle_is_the_same_grid():
    whole = video.read_video(REPORTS / "vfr.mp4").frames
    for start in (0.5, 1.7, 3.0, 4.49):
        with video.open_video(REPORTS / "vfr.mp4", start=start) as clip:
            assert torch.equal(torch.stack(list(clip.frames)), whole[int(30 * start + 1e-6) :])


@pytest.mark.parametrize("suffix", [".gif", ".apng", ".webp"])
def test_pictures_with_their_own_delays(tmp_path, suffix):
    images = ramp(5)
    back = video.read_video(animated(tmp_path / f"a{suffix}", images, [2000, 100, 100, 100, 500]))
    assert back.fps == 10 and len(back.frames) == 28
    want = np.repeat(images, [20, 1, 1, 1, 5], axis=0)
    assert apart(back.frames, want) <= 2


def test_pixels_are_made_square():
    back = video.read_video(REPORTS / "sar.mp4")
    assert (back.height, back.width) == (576, 1024)
    bright = back.frames[0].float().mean(-1) > back.frames[0].float().mean() * 1.5
    rows, columns = bright.any(1).sum(), bright.any(0).sum()
    assert abs(int(rows) - int(columns)) <= 2 and rows > 300
    # FFmpeg's own filter; the matrix is BT.601, as players take it below 720 lines
    assert apart(back.frames, filtered("sar.mp4", "scale=1024:576:flags=bilinear")) <= 1


def test_a_mirrored_picture():
    assert apart(video.read_video(REPORTS / "hflip.mp4").frames, filtered("hflip.mp4", "hflip")) == 0


def test_high_dynamic_range_becomes_sdr():
    master = torch.from_numpy(np.asarray(Image.open(REPORTS / "hdr_src.png")).copy())
    back = video.read_video(REPORTS / "hdr_real.mp4").frames
    plain = filtered("hdr_real.mp4")
    assert frames_psnr(torch.from_numpy(plain[0]), master) < 9
    assert min(frames_psnr(frame, master) for frame in back) > 23.5


def test_without_the_filter_one_warning_a_file(monkeypatch):
    monkeypatch.setattr(av.filter, "filters_available", set())
    with pytest.warns(video.VideoWarning, match="high dynamic range is not mapped") as caught:
        back = video.read_video(REPORTS / "hdr_real.mp4")
    assert len(caught) == 1 and len(back.warnings) == 1 and len(back.frames) == 6


def test_one_bad_packet():
    with pytest.warns(video.VideoWarning, match=r"one_bad_packet.mp4: 1 damaged packet lost$") as caught:
        back = video.read_video(REPORTS / "one_bad_packet.mp4")
    assert len(caught) == 1 and back.warnings == ("1 damaged packet lost",)
    # the frame before it is shown in its place
    assert len(back.frames) == 50 and torch.equal(back.frames[26], back.frames[25])
    with pytest.raises(video.VideoError, match=r"one_bad_packet\.mp4: damaged"):
        video.read_video(REPORTS / "one_bad_packet.mp4", strict=True)


def test_fields_are_joined():
    def comb(frames):
        rows = np.asarray(frames).astype(int)
        return np.abs(2 * rows[:, 1:-1] - rows[:, :-2] - rows[:, 2:]).mean()

    back = video.read_video(REPORTS / "interlaced.mpg")
    assert len(back.frames) == 12 and back.fps == 25
    assert comb(filtered("interlaced.mpg")) > 20 and comb(back.frames) < 0.1
    assert apart(back.frames, filtered("interlaced.mpg", "bwdif=mode=send_frame:deint=interlaced")) <= 1


def test_colours_come_back_from_a_written_file(tmp_path):
    source = video.read_video(REPORTS / "hd_709.mp4").frames
    # BT.709, limited range, computed from the planes of the first frame
    luma, blue, red = (np.frombuffer(plane, np.uint8)[0] for plane in decoded("hd_709.mp4")[0].planes)
    y, pb, pr = (float(luma) - 16) / 219, (float(blue) - 128) / 224, (float(red) - 128) / 224
    want = 255 * np.array([y + 1.5748 * pr, y - 0.1873 * pb - 0.4681 * pr, y + 1.8556 * pb])
    assert np.abs(source[0, 0, 0].numpy() - want).max() <= 2
    for height, matrix in ((720, 1), (480, 6)):
        frames = video.resize(source, height, height * 16 // 9 // 2 * 2)
        video.write_video(tmp_path / "a.mp4", frames, 10, quality=4)
        with av.open(str(tmp_path / "a.mp4")) as container:
            codec = container.streams.video[0].codec_context
            tags = codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range
        assert tags == (matrix, matrix, matrix, 1)
        assert apart(video.read_video(tmp_path / "a.mp4").frames, frames) <= 2


def test_a_rate_that_a_gif_cannot_carry(tmp_path):
    source = video.read_video(REPORTS / "r240.mp4")
    assert source.fps == 240 and len(source.frames) == 48
    with pytest.warns(video.VideoWarning, match="a GIF shows at most 50 frames a second, so 240 become 50"):
        assert video.write_video(tmp_path / "a.gif", source.frames, 240) == 10
    back = video.read_video(tmp_path / "a.gif")
    assert back.fps == 50 and len(back.frames) == 10
    for slot in (0, 3, 9):
        assert frames_psnr(back.frames[slot], source.frames[int(np.ceil(slot * 4.8))]) > 25


def test_a_plain_file_gives_no_warning(tmp_path):
    path = encode(tmp_path / "a.mp4", [picture()] * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert video.read_video(path).warnings == ()
    assert len(video.read_video(copied(path, tmp_path / "b.mkv")).frames) == 5
