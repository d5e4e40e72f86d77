"""Where nothing moves the picture stands; where something moves, the tokens are as before."""

import pytest
import torch

import vft
from vft import video
from vft.demo import CLIP
from vft.metrics import frames_psnr
from vft.stills import hold, join_ids, repeats, still_groups
from vft.train.procedural import batch


@pytest.fixture(scope="module")
def tiny():
    return vft.Tokenizer.from_pretrained("tiny")


def plain(tokenizer, frames):
    """The tokens by the definition of a chunk alone, however still it is."""
    chunks = [chunk for chunk, _ in video.cut_chunks(frames, 17, 1, 4)]
    ids = tokenizer.encode_chunks(chunks)
    still = [[False] * (len(chunk) // 4) for chunk in chunks]
    return tokenizer.join_chunks(ids, still, 25, len(frames), 64, 64)


def change(frames):
    frames = frames.float()
    return (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))


@pytest.mark.parametrize("keep", [32, 4])
def test_a_still_picture_does_not_flicker(tiny, keep):
    still = video.read_video(CLIP, 64, max_frames=1).frames.repeat(50, 1, 1, 1)
    before = video.to_uint8(tiny.decode(plain(tiny, still), keep=keep))
    after = video.to_uint8(tiny.decode(tiny.encode(still), keep=keep))
    assert len(after) == 50
    assert change(before)[4::4].mean() > 2.5
    # the first group of frames adds to what the first frame holds, from then on nothing changes
    assert change(after)[4:].max() == 0 and change(after).mean() < 0.2 * change(before).mean()
    assert frames_psnr(after, still) > frames_psnr(before, still) - (0.1 if keep == 32 else 1.2)


def test_moving_video_is_as_before(tiny):
    for frames in (video.read_video(CLIP, 64).frames, video.to_uint8(batch(77, [1], size=64)[0])):
        tokens, before = tiny.encode(frames), plain(tiny, frames)
        assert torch.equal(tokens.ids, before.ids) and not repeats(tokens.ids).any()
        for keep in (32, 4):
            assert torch.equal(tiny.decode(tokens, keep=keep), tiny.decode(before, keep=keep))


def test_a_pause_in_the_middle(tiny):
    """Moving, 40 frames of pause, moving: what moves is encoded as it comes, the pause stands."""
    moving = video.read_video(CLIP, 64).frames
    frames = torch.cat([moving[:17], moving[16:17].repeat(40, 1, 1, 1), moving[17:]])
    tokens = tiny.encode(frames)
    assert repeats(tokens.ids).tolist() == [False] * 5 + [True] * 10 + [False] * 4
    decoded = video.to_uint8(tiny.decode(tokens))
    assert change(decoded[16:57]).max() == 0 and change(decoded[:17]).min() > 0 and change(decoded[57:]).min() > 0
    assert (
        frames_psnr(decoded[57:], frames[57:])
        > frames_psnr(video.to_uint8(tiny.decode(plain(tiny, frames)))[57:], frames[57:]) - 0.5
    )


def test_still_groups_compare_with_the_frame_before_the_run():
    frames = torch.zeros(17, 4, 4, 3, dtype=torch.uint8)
    assert still_groups(frames, 4) == [True] * 4
    assert still_groups(frames.permute(0, 3, 1, 2) / 127.5 - 1, 4) == [True] * 4
    # slow change adds up: a third of a level a frame
    slow = (torch.arange(17) // 3).to(torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)
    assert not all(still_groups(slow, 4))
    # one small thing that moves
    frames[6, 1, 1] = 30
    assert still_groups(frames, 4) == [True, False, True, True]
    assert still_groups(frames[:1], 4) == []


def test_ids_and_frames_of_still_groups():
    first, second = torch.arange(10).view(5, 2), 10 + torch.arange(6).view(3, 2)
    joined = join_ids([first, second], [[True, False, True, True], [True, False]])
    assert joined.tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5], [4, 5], [14, 15]]
    assert repeats(joined).tolist() == [False, False, False, True, True, True, False]
    frames = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert hold(frames, [False, False, True], 2).flatten().tolist() == [0, 1, 2, 2, 2]
    assert hold(frames, [False, True, False], 2).flatten().tolist() == [0, 0, 0, 3, 4]
