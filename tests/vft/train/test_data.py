"""What runs learn from: folders with damaged files in them, clips from the middle of a video, token files, captions."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from train_worker import COMMON, SETTINGS, SMALL

import vft
from vft.config import parse_config
from vft.train import data, generator, tokenizer
from vft.train.generator import GeneratorSettings, GeneratorTask
from vft.video import VideoError, open_video, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of which every frame is one gray, 5 more each, in two subfolders; two files that are none."""
    folder = tmp_path_factory.mktemp("videos")
    frames = (5 * torch.arange(40, dtype=torch.uint8))[:, None, None, None].expand(-1, 32, 32, 3)
    for name in ("a/one", "b/two"):
        (folder / name).parent.mkdir()
        write_video(folder / f"{name}.mp4", frames, 10)
    whole = (folder / "a" / "one.mp4").read_bytes()
    (folder / "a" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video")
    return folder


def test_a_video_can_be_read_from_its_middle(videos):
    with open_video(videos / "a" / "one.mp4") as video:
        everything = [int(frame[0, 0, 0]) for frame in video.frames]
    assert len(everything) == 40
    for start, index in ((0.05, 0), (1.0, 10), (1.26, 12), (3.9, 39), (100.0, 39)):
        with open_video(videos / "a" / "one.mp4", start=start) as video:
            assert [int(frame[0, 0, 0]) for frame in video.frames] == everything[index:], start
    with pytest.raises(ValueError, match="start must be at least 0"), open_video(videos / "a" / "one.mp4", start=-1):
        pass


def test_a_run_skips_and_lists_what_is_damaged(videos, tmp_path, capsys):
    settings = replace(SETTINGS, steps=2, data=str(videos))
    tokenizer.train(tmp_path, settings, config=SMALL)
    skipped = json.loads((tmp_path / "skipped.0.json").read_text())
    assert skipped.keys() == {"a/cut.mp4", "text.mp4"} and "damaged" in skipped["a/cut.mp4"]
    assert "2 files of" in capsys.readouterr().err
    # other files are other data
    (videos / "text.mp4").rename(videos / "text.mp4.gone")
    (videos / "b" / "three.mp4").write_bytes((videos / "b" / "two.mp4").read_bytes())
    try:
        with pytest.raises(ValueError, match=r"data\.digest .* data\.files 2 \(now 3\)"):
            tokenizer.train(tmp_path, settings, config=SMALL)
    finally:
        (videos / "b" / "three.mp4").unlink()
        (videos / "text.mp4.gone").rename(videos / "text.mp4")


def test_clips_of_videos_repeat_and_pass_over_a_file_that_fails_later(videos, monkeypatch):
    source = data.Videos(str(videos), 0, data.Shapes(0, (5, 17), (16, 32)))
    assert source.classes == ("a", "b") and [source.label(i) for i in range(3)] == [0, 1, 0]
    clips = [source.clip(i) for i in range(12)]
    assert {tuple(clip.shape) for clip in clips} == {(3, t, s, s) for t in (5, 17) for s in (16, 32)}
    assert all(torch.equal(clip, source.clip(i)) for i, clip in enumerate(clips))
    assert len({float(clip[0, 0, 0, 0]) for clip in clips}) > 4
    read = data._read

    def fails(path, *rest):
        if path.name == "one.mp4":
            raise VideoError(f"{path}: damaged")
        return read(path, *rest)

    monkeypatch.setattr(data, "_read", fails)
    assert torch.equal(source.clip(1), clips[1]) and source.clip(0).shape == clips[0].shape
    assert source.skipped["a/one.mp4"].endswith("damaged")


def test_clips_are_encoded_by_shape_and_kept_while_there_is_room():
    calls = []

    def encode(pixels):
        calls.append(tuple(pixels.shape))
        return pixels.mean((2, 3, 4))

    clips = data.Clips(encode, data.Procedural(0, data.Shapes(0, (1, 5), (16,))))
    first = clips.batch([3, 1, 2, 3])
    assert sum(shape[0] for shape in calls) == 3 and len(calls) == len({shape[2] for shape in calls})
    assert torch.equal(first[0], first[3]) and torch.equal(clips.batch([1])[0], first[1])
    assert sum(shape[0] for shape in calls) == 3
    clips.room = 0
    assert torch.equal(clips.batch([9])[0], clips.batch([9])[0]) and 9 not in clips.encoded


@pytest.fixture(scope="module")
def token_files(tmp_path_factory):
    """A tokenizer of 4 registers of 64 ids, and token files of 5 and 9 latent frames, one damaged, with captions."""
    folder = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    model = vft.Tokenizer(parse_config(SMALL), "small")
    model.save(folder / "small.safetensors")
    for name, frames in (("a/one", 17), ("b/two", 33), ("b/three", 17)):
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        tokens = model.encode(torch.randint(256, (frames, 16, 16, 3), dtype=torch.uint8))
        tokens.save(folder / "set" / f"{name}.vft")
        mask = torch.tensor([[1, 1, 0]])
        save_file({"text_emb": torch.randn(1, 3, 8), "text_mask": mask}, folder / "set" / f"{name}.safetensors")
    (folder / "set" / "b" / "bad.vft").write_bytes(b"VFT")
    return folder


def token_settings(folder, **changes) -> GeneratorSettings:
    common = {**COMMON, "frames": (), "data": f"{folder}/set", "tokenizer": f"{folder}/small.safetensors"}
    return GeneratorSettings(**(common | {"depth": 1, "tokens_per_frame": 2} | changes))


def test_a_generator_learns_from_token_files_of_any_length(token_files, tmp_path):
    generator.train(tmp_path, token_settings(token_files, corruption=0.1))
    gen = vft.Generator.from_pretrained(tmp_path / "model.safetensors")
    assert (gen.classes, gen.config.seq_len) == (("a", "b"), 18)
    assert json.loads((tmp_path / "skipped.0.json").read_text()).keys() == {"b/bad.vft"}


def test_the_ragged_loss_is_the_mean_of_the_clips_cross_entropy(token_files):
    settings = token_settings(token_files, class_dropout=0.0)
    task = GeneratorTask(settings, vft.Tokenizer.from_pretrained(settings.tokenizer))
    indices = task.indices(torch.Generator().manual_seed(0))
    flat = [vft.time_first(ids[:, :2]) for ids in task.data.batch(indices)]
    assert len({len(ids) for ids in flat}) == 2
    each = []
    for i, ids in zip(indices, flat, strict=True):
        logits = task.model.logits(ids[None], task.data.label(i))[0]
        each.append(torch.nn.functional.cross_entropy(logits, ids))
    loss = task.loss(torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    halves = [task.loss(torch.Generator().manual_seed(0), part).item() for part in (slice(0, 2), slice(2, 4))]
    assert loss.item() == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_a_generator_learns_from_captions(token_files, tmp_path):
    generator.train(tmp_path, token_settings(token_files, condition="text", latent_frames=5, class_dropout=0.5))
    config = vft.Generator.from_pretrained(tmp_path / "model.safetensors").config
    assert (config.cond, config.ctx_dim, config.seq_len) == ("text", 8, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "tiny"}, "none of its 4 files can be read"),
        ({"data": "procedural", "condition": "text"}, "need data to be a folder of .vft files"),
        ({"condition": "colour"}, "condition must be one of class, text"),
        ({"latent_frames": -1}, "latent_frames must be at least 0"),
        ({"corruption": 1.0}, "corruption must be at least 0 and below 1"),
    ],
)
def test_wrong_settings(token_files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generator.train(tmp_path, token_settings(token_files, **changes))
    with pytest.raises(OSError, match="no such folder"):
        tokenizer.train(tmp_path, replace(SETTINGS, data=f"{tmp_path}/nothing"), config=SMALL)
