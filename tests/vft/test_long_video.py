"""Long video: the same tokens chunk by chunk as from the whole clip, in memory that does not grow with the length."""

import os
import subprocess
import sys

import pytest
import torch
from small_tokenizer import small

import vft
from vft import video
from vft.video import cut_chunks


def file_of(path, frames, size=48):
    generator = torch.Generator().manual_seed(frames)
    pixels = torch.randint(256, (frames, 6, 8, 3), dtype=torch.uint8, generator=generator)
    video.write_video(path, video.resize(pixels, size, size * 4 // 3), 12.5)
    return path


def whole_clip_ids(model, path, batch=8):
    """The definition: all frames in memory, chunks 17 long every 16 frames, the last one as long as it must be."""
    clip = video.preprocess(video.read_video(path, model.size).frames, model.size)
    frames = clip.shape[1]
    count = max(1, -(-(frames - 1) // 16))
    clip = torch.cat([clip, clip[:, -1:].expand(-1, (1 - frames) % 4, -1, -1)], 1)
    chunks = [clip[:, 16 * i : 16 * i + 17] for i in range(count)]
    rows = []
    for start in range(0, count, batch):
        latents = [model.codec.encode(chunk[None])[0] for chunk in chunks[start : start + batch]]
        rows += [ids[min(i, 1) :] for i, ids in enumerate(model.encode_latents(latents), start)]
    return torch.cat(rows)


@pytest.mark.parametrize("frames", [1, 2, 17, 18, 150])
def test_a_file_gives_the_tokens_of_the_whole_clip(tmp_path, frames):
    model, path = small(), file_of(tmp_path / "a.mp4", frames)
    tokens = model.encode(path)
    assert tokens.frames == frames and (tokens.fps, tokens.height, tokens.width) == (12.5, 48, 64)
    assert torch.equal(tokens.ids, whole_clip_ids(model, path))
    assert torch.equal(model.encode(video.read_video(path)).ids, tokens.ids)
    assert torch.equal(model.encode(path, batch=3).ids, whole_clip_ids(model, path, batch=3))


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("frames", range(1, 14))
def test_chunks_hold_every_frame_in_order(frames, overlap, stride):
    stream = iter(torch.arange(frames))
    cut = list(cut_chunks(stream, 5, overlap, stride))
    assert sum(new for _, new in cut) == frames
    seen = [int(i) for k, (chunk, new) in enumerate(cut) for i in chunk[(k > 0) * overlap :][:new]]
    assert seen == list(range(frames))
    assert all(len(chunk) == 5 for chunk, _ in cut[:-1])
    last, new = cut[-1]
    held = (len(cut) > 1) * overlap + new
    assert held <= len(last) < held + stride and len(last) % stride == 1 % stride
    assert (last[(len(cut) > 1) * overlap + new - 1 :] == frames - 1).all()


def test_chunks_are_cut_as_frames_come():
    taken = []
    stream = (taken.append(i) or torch.tensor(i) for i in range(1000))
    next(cut_chunks(stream, 5, 1))
    assert len(taken) == 6
    with pytest.raises(ValueError, match="at least one frame"):
        next(cut_chunks(iter(()), 5, 1))


def test_chunks_of_different_shapes_share_a_call():
    model = small()
    chunks = [torch.randint(256, (n, s, s, 3), dtype=torch.uint8) for n, s in [(17, 32), (1, 48), (17, 48), (5, 32)]]
    together = model.encode_chunks(chunks)
    assert [ids.shape for ids in together] == [(5, 4), (1, 4), (5, 4), (2, 4)]
    for chunk, ids in zip(chunks, together, strict=True):
        assert torch.equal(ids, model.encode_chunks([chunk])[0])


def test_chunks_are_decoded_from_the_seed():
    model = small()
    for layer in (model.decoder.head, model.decoder.head_modulation):
        torch.nn.init.normal_(layer.weight, std=0.1)
    tokens = model.encode(torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8))
    options = dict(steps=2, guidance=None)
    first, again, other = (list(model.decode_stream(tokens, seed=s, **options)) for s in (1, 1, 2))
    assert [p.shape[1] for p in first] == [17, 16, 7]
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    begin = vft.VideoTokens(tokens.ids[:9], tokens.fps, 33, 32, 32, tokens.model, tokens.levels)
    assert all(map(torch.equal, model.decode_stream(begin, seed=1, **options), first))


def test_wrong_batch():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        small().encode(torch.zeros(1, 3, 1, 32, 32), batch=0)


def test_headline_shape(tmp_path):
    """81 frames are 21 x 128 = 2,688 tokens."""
    model = vft.Tokenizer.from_pretrained("tiny")
    tokens = model.encode(file_of(tmp_path / "a.mp4", 81))
    assert tokens.ids.shape == (21, 128) and tokens.ids.numel() == 2688 and tokens.frames == 81
    pieces = list(model.decode_stream(tokens, steps=1, guidance=None))
    assert [p.shape[1] for p in pieces] == [17, 16, 16, 16, 16]


MEMORY = """
import resource, sys
import torch
from small_tokenizer import small
from vft import video

torch.set_num_threads(1)
model, folder = small(256), sys.argv[1]

def encode(frames):
    tokens = model.encode(f"{folder}/{frames}.mkv", batch=2)
    assert tokens.frames == frames
    return tokens

def decode(frames):
    pieces = model.decode_stream(encode(frames), steps=1, guidance=None)
    assert video.write_video(f"{folder}/out.mp4", map(video.to_uint8, pieces), 10, 51) == frames

for run in (encode, decode):
    # the allocator settles within a few short runs
    for frames in (81, 81, 81, 320):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(frames)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_length(tmp_path):
    for frames in (81, 320):
        # two pictures in turn: what does not move is not decoded
        flat = [torch.full((1, 256, 256, 3), level, dtype=torch.uint8) for level in (90, 120)]
        video.write_video(tmp_path / f"{frames}.mkv", (flat[i % 2] for i in range(frames)), 25, quality=51)
    # one pool of memory for all threads; from elsewhere, so that the installed package is meant and not this folder
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", MEMORY, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    growth = [1024 * int(kilobytes) for kilobytes in run.stdout.split()]
    # the frames alone, 8 bits a value: as floating point they are four times as much
    assert len(growth) == 2 and max(growth) < 320 * 256 * 256 * 3 / 3
