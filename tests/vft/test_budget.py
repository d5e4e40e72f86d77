"""The registers that a video needs: by what decoding gives, within a budget, and predicted."""

import itertools

import pytest
import torch
from small_tokenizer import small

import vft
from vft import budget, cli
from vft.demo import CLIP
from vft.metrics import psnr
from vft.train import procedural


@pytest.fixture(scope="module")
def tiny():
    return vft.Tokenizer.from_pretrained("tiny")


@pytest.fixture(scope="module")
def clips():
    return procedural.batch(6_000_000, range(12))


def test_probes_and_what_lies_between():
    assert budget.probes(14) == [1, 2, 3, 4, 6, 8, 12, 14]
    assert budget.probes(1) == [1]
    curve = budget.interpolated(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double(), 6)
    between = 4 + torch.tensor(5 / 4).log() / torch.tensor(6 / 4).log()
    assert torch.allclose(curve, torch.tensor([1.0, 2.0, 3.0, 4.0, between, 5.0]).double())
    assert budget.interpolated(torch.tensor([5.0]), 1).tolist() == [5.0]


def test_the_fewest_registers_that_reach_a_target():
    curve = torch.tensor([10.0, 12.0, 12.0, 15.0]).double()
    assert [budget.choose([curve], [5], target, None) for target in (9, 12, 12.5, 20)] == [[1], [2], [4], [4]]
    assert budget.choose([curve, curve + 5], [5, 5], 15, None) == [4, 1]
    # as much of the way as the budget pays for
    assert budget.choose([curve, curve + 5], [5, 5], 15, 20) == [2, 1]


def test_a_budget_goes_where_it_helps_most():
    generator = torch.Generator().manual_seed(0)
    frames = [5, 9, 5]
    for _ in range(20):
        steps = torch.rand(3, 4, generator=generator).double().sort(1, descending=True).values
        curves, most = steps.cumsum(1), 60
        kept = budget.choose(list(curves), frames, None, most)

        def spent(k):
            return sum(t * n for t, n in zip(frames, k, strict=True))

        def mean(k):
            return sum(float(curve[n - 1]) for curve, n in zip(curves, k, strict=True)) / 3  # noqa: B023

        best = max(mean(k) for k in itertools.product(range(1, 5), repeat=3) if spent(k) <= most)
        assert spent(kept) <= most
        # within one register of the best
        assert mean(kept) > best - float(steps[:, 1:].max()) / 3
    with pytest.raises(ValueError, match="budget must be at least one token a latent frame, 19, got 18"):
        budget.choose(list(curves), frames, None, 18)


def quality(tokenizer, tokens, clip):
    return float(psnr(tokenizer.decode(tokens), clip[None]))


def test_a_video_is_kept_as_far_as_its_target_needs(tiny, clips):
    tokens = tiny.encode(clips[:4], target_psnr=17.5)
    assert len({t.registers for t in tokens}) > 1
    for t, clip in zip(tokens, clips[:4], strict=True):
        # a curve is interpolated
        assert quality(tiny, t, clip) > 17.3
        assert quality(tiny, t.truncate(t.registers // 2), clip) < 17.5


def test_a_budget_of_several_clips_beats_as_many_tokens_each(tiny, clips):
    tokens = tiny.encode(clips, budget=12 * 5 * 4)
    assert sum(t.ids.numel() for t in tokens) <= 240
    same = [t.truncate(4) for t in tiny.encode(clips)]
    own, fixed = (sum(quality(tiny, t, c) for t, c in zip(each, clips, strict=True)) / 12 for each in (tokens, same))
    assert own > fixed + 0.1, (own, fixed)


def test_one_video_takes_all_of_a_budget(tiny, monkeypatch):
    monkeypatch.setattr(budget, "decoded_errors", None)
    assert tiny.encode(CLIP, budget=101).registers == 11


def test_progress_counts_frames(tiny):
    seen = []
    tiny.encode(CLIP, batch=1, progress=seen.append)
    assert seen == [17, 33]


def fitted(fingerprint):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).double()
    y = torch.stack([x[:, 0] - 3, 0.5 * x[:, 1].square() - 4], 1).exp()
    return x, y, budget.Predictor.fit(x, y, fingerprint)


def test_a_predictor_learns_and_is_saved(tmp_path):
    x, y, predictor = fitted("0" * 16)
    assert (predictor(x) / y).log().abs().mean() < 0.01
    predictor.save(tmp_path / "p.safetensors")
    again = budget.Predictor.load(tmp_path / "p.safetensors")
    assert torch.equal(again(x), predictor(x)) and again.fingerprint == "0" * 16
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(ValueError, match="must be a predictor that vft train budget has made"):
        budget.Predictor.load(tmp_path / "broken")
    with pytest.raises(ValueError, match="chunks must be more than 8, got 8"):
        budget.Predictor.fit(x[:8], y[:8], "")


def test_a_predictor_of_another_model_is_refused(tiny):
    with pytest.raises(ValueError, match="predictor must be that of 'tiny'"):
        tiny.encode(CLIP, target_psnr=20, predictor=fitted("0" * 16)[2])


def test_training_a_predictor(tmp_path, capsys, monkeypatch):
    model = tmp_path / "small.safetensors"
    small().save(model)
    out = tmp_path / "budget.safetensors"
    assert cli.main(["train", "budget", "-o", str(out), "--model", str(model), "--clips", "72"]) == 0
    assert "(root mean square of 14 clips left out)\nNext: vft encode VIDEO" in capsys.readouterr().out
    # nothing is decoded with it
    monkeypatch.setattr(budget, "decoded_errors", None)
    words = ["encode", str(CLIP), "-o", str(tmp_path / "a.vft"), "--model", str(model), "--predictor", str(out)]
    assert cli.main([*words, "--psnr", "60"]) == 0
    assert vft.VideoTokens.load(tmp_path / "a.vft").registers >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--psnr", "20", "-k", "3"], "--psnr chooses the registers of one video"),
        (["--tokens", "20", "--batch"], "--tokens chooses the registers of one video"),
        (["--predictor", "x"], "--predictor needs --psnr"),
        (["--psnr", "-1"], "target_psnr must be above 0, got -1"),
        (["--psnr", "20", "--predictor", "gone"], "gone: no such file"),
    ],
)
def test_wrong_words(tmp_path, capsys, words, message):
    assert cli.main(["encode", str(CLIP), "-o", str(tmp_path / "a.vft"), *words]) == 2
    assert message in capsys.readouterr().err
