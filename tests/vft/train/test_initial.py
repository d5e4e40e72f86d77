"""The starting point of training: each register speaks for a region of the frame from the first step on."""

import pytest
import torch

import vft
from vft.config import make_config, parse_config
from vft.train import initial
from vft.train.tokenizer import TINY


@pytest.fixture(scope="module")
def started():
    torch.manual_seed(0)
    model = vft.Tokenizer(parse_config(make_config(**TINY)), "tiny")
    latents = torch.randn(8, 16, 5, 8, 8)
    assert initial.fits(model, 4, 4)
    initial.start(model, 4, 4, latents)
    return model.requires_grad_(False), latents


def test_regions_cover_the_frame_coarse_to_fine():
    regions = initial.regions(32, 4, 4)
    assert [len(rows) * len(columns) for rows, columns in regions] == [16] + [4] * 4 + [16] + [1] * 16 + [2] * 8 + [
        8
    ] * 2
    for part in (regions[1:5], regions[6:22], regions[22:30]):
        cells = [(i, j) for rows, columns in part for i in rows for j in columns]
        assert sorted(cells) == [(i, j) for i in range(4) for j in range(4)]
    # the first two single patches are not neighbours
    (a, b), (c, d) = ((rows[0], columns[0]) for rows, columns in regions[6:8])
    assert abs(a - c) + abs(b - d) > 1
    assert len(initial.regions(5, 1, 3)) == 5


def test_a_register_starts_with_its_own_patch(started):
    model, latents = started
    before = model.encoder(list(latents)).view(8, 5, 32, 6)
    assert before.std((0, 1, 2)).allclose(torch.tensor(initial.VALUE_STD), atol=0.05)
    for register in (6, 11, 21):
        rows, columns = initial.regions(32, 4, 4)[register]
        moved = torch.zeros(4, 4)
        for i in range(4):
            for j in range(4):
                changed = latents.clone()
                changed[:, :, 2, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += torch.randn(8, 16, 2, 2)
                after = model.encoder(list(changed)).view(8, 5, 32, 6)
                assert torch.equal(after[:, :2], before[:, :2])
                moved[i, j] = (after - before)[:, 2, register].square().mean()
        own = moved[rows[0], columns[0]].item()
        moved[rows[0], columns[0]] = 0
        assert own > 2 * moved.max()


def test_the_first_velocity_follows_the_input(started):
    model, latents = started
    codes = torch.zeros(8 * 5 * 32, 6)
    out = model.decoder(list(latents), torch.ones(1), codes, [32] * 8, [0] * 8, [False] * 8)
    similarity = torch.nn.functional.cosine_similarity(torch.stack(out).flatten(), latents.flatten(), dim=0)
    assert similarity > 0.4


def test_a_model_without_room_is_left_alone():
    narrow = parse_config(make_config(encoder_width=64, decoder_width=64, registers=4, codec="linear", size=64))
    assert not initial.fits(vft.Tokenizer(narrow), 4, 4)
