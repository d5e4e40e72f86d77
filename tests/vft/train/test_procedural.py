"""Procedural video: repeatable, of natural statistics, and moving as its label says."""

import warnings

import pytest
import torch

from vft.train.procedural import FAMILIES, batch, clip, label

MEANS = [[84.5, 87.0, 85.7], [92.3, 58.6, 50.6], [67.2, 68.8, 96.0], [131.7, 182.5, 178.8]]


@pytest.fixture(scope="module")
def clips():
    """uint8 [128, T, H, W, 3]"""
    return torch.stack([clip(11, i) for i in range(128)])


def _flow(clips):
    """Mean absolute change from frame to frame, [n]."""
    return clips.float().diff(dim=1).abs().flatten(1).mean(1)


def test_a_clip_depends_on_its_seed_and_index_alone(clips):
    assert clips[7].shape == (17, 64, 64, 3) and clips[7].dtype == torch.uint8
    assert torch.equal(clips[7], clip(11, 7))
    assert not torch.equal(clips[7], clip(12, 7)) and not torch.equal(clips[7], clip(11, 8))
    assert len({tuple(c[0].flatten()[:999].tolist()) for c in clips}) == 128


def test_batch_is_the_clips_in_any_order_on_any_threads(clips):
    for indices, threads in (([3, 0, 99], 1), ([99, 3, 0, 3], 3)):
        video = batch(11, indices, threads=threads)
        assert video.shape == (len(indices), 3, 17, 64, 64) and video.dtype == torch.float32
        expected = clips[indices].permute(0, 4, 1, 2, 3) / 127.5 - 1
        torch.testing.assert_close(video, expected, rtol=0, atol=1e-6)
        assert video.min() >= -1 and video.max() <= 1
    assert batch(11, []).shape == (0, 3, 17, 64, 64)


def test_the_content_is_that_of_the_trained_model(clips):
    """Mean colours of four clips: a change of the generator needs a new codec and a new model."""
    means = torch.stack([clip(0, i).float().mean((0, 1, 2)) for i in range(4)])
    torch.testing.assert_close(means, torch.tensor(MEANS), rtol=0, atol=0.5)


def test_length_and_size_keep_the_content():
    full = clip(2, 5).float()
    short = clip(2, 5, frames=5).float()
    assert (full[:5] - short).abs().max() <= 2
    large = clip(2, 5, size=128, frames=17).float()
    small = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert (small - full).abs().mean() < 4
    assert clip(2, 5, size=1, frames=1).shape == (1, 1, 1, 3)


def test_every_family_occurs_and_moves(clips):
    labels = torch.tensor([label(11, i) for i in range(128)])
    assert set(labels.tolist()) == set(range(len(FAMILIES)))
    flow = _flow(clips)
    medians = {name: flow[labels == family].median() for family, name in enumerate(FAMILIES)}
    assert medians.pop("still") < 0.5 and (flow == 0).any()
    # in grey levels a frame; without the family's own motion all are below 1.6
    assert all(median > 2 for median in medians.values()), medians


def test_motion_is_smooth(clips):
    """A frame is closer to its neighbour than to the frame four later."""
    moving = clips[_flow(clips) > 1].float()
    near = (moving[:, 1:13] - moving[:, :12]).abs().mean()
    far = (moving[:, 4:16] - moving[:, :12]).abs().mean()
    assert near < 0.6 * far


def test_statistics_are_those_of_natural_images(clips):
    image = clips[:, 8].float()
    image = image - image.mean((1, 2), keepdim=True)
    grey = image.mean(-1)
    window = torch.hann_window(64, periodic=False)
    power = torch.fft.fft2(grey * window[:, None] * window).abs().square().mean(0)
    frequency = torch.fft.fftfreq(64)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    band = (radius > 0.04) & (radius < 0.4)
    columns = torch.stack([radius[band].log(), torch.ones(int(band.sum()))], 1)
    slope = torch.linalg.lstsq(columns, power[band].log()[:, None]).solution[0, 0]
    # filmed and drawn video of this size has -2.9; plain edges alone give -3 and smoother
    assert -3.8 < slope < -2
    pixels = image.flatten(0, 2).T
    correlation = torch.corrcoef(pixels)[[0, 0, 1], [1, 2, 2]]
    assert correlation.min() > 0.5 and correlation.max() < 0.98
    assert 80 < clips.float().mean() < 170 and clips.float().mean((1, 2, 3)).std() > 25


def test_no_clip_divides_by_zero_or_overflows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(200):
            clip(13, index, size=16, frames=3)


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1), (0, 0, 0), (0, 0, 64, 0)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must be >="):
        clip(*arguments)


def test_recipe_2_films_every_second_clip():
    for i in (0, 2):
        assert torch.equal(clip(3, i, recipe=2), clip(3, i))
    for i in (1, 3):
        filmed = clip(3, i, recipe=2)
        assert filmed.shape == (17, 64, 64, 3) and torch.equal(filmed, clip(3, i, recipe=2))
        assert not torch.equal(filmed, clip(3, i))
    video = clip(3, 1, recipe=2).permute(3, 0, 1, 2) / 127.5 - 1
    torch.testing.assert_close(batch(3, [1], recipe=2)[0], video, rtol=0, atol=1e-6)
    assert clip(3, 1, size=1, frames=1, recipe=2).shape == (1, 1, 1, 3)
    with pytest.raises(ValueError, match="recipe must be one of"):
        clip(3, 1, recipe=3)


def test_filmed_clips_are_lens_blurred_and_noisy():
    """Less of fine structure in the smooth ones, more change from frame to frame in the noisy ones."""
    some = list(range(1, 60, 2))
    filmed = torch.stack([clip(5, i, recipe=2) for i in some]).float()
    plain = torch.stack([clip(5, i) for i in some]).float()
    steps = [x.diff(dim=3).abs().flatten(1).mean(1) for x in (filmed, plain)]
    assert (steps[0] < 0.8 * steps[1]).sum() >= 5 and (steps[0] > 1.1 * steps[1]).sum() >= 3
    assert filmed.std() > 0.7 * plain.std()
