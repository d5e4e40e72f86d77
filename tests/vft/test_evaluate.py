"""The measures of ``vft eval`` against their formulas, and the command on a small model."""

import json
import math

import pytest
import torch

import vft
from vft import cli, evaluate, metrics
from vft.config import make_config, parse_config, parse_generator_config
from vft.train import classifier, named, procedural
from vft.words import MOTIONS, embed

SMALL = make_config(
    encoder_width=32, encoder_depth=1, decoder_width=32, decoder_depth=1, head_dim=32, registers=3, codec="linear",
    size=16,
)  # fmt: skip


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 3, 2, 4, 4)
    video = reference + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(metrics.psnr(video, reference), torch.tensor([20.0, 40.0]))


def test_ssim_of_one_window_is_its_formula():
    x, y = torch.rand(2, 1, 3, 1, 11, 11, dtype=torch.float64) * 2 - 1
    a, b = (metrics._luma(z)[0, 0] for z in (x, y))
    distance = (torch.arange(11) - 5.0).square()
    weight = torch.exp(-(distance[:, None] + distance) / (2 * 1.5**2))
    weight = weight / weight.sum()
    ma, mb = (weight * a).sum(), (weight * b).sum()
    va, vb, cov = ((weight * p * q).sum() for p, q in ((a - ma, a - ma), (b - mb, b - mb), (a - ma, b - mb)))
    want = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    torch.testing.assert_close(metrics.ssim(x, y)[0], want, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="at least 11x11"):
        metrics.ssim(x[..., :8], y[..., :8])


def test_distances_order_clips():
    clip = procedural.batch(0, [1], 32, 5)
    slight, strong = clip + 0.02 * torch.randn_like(clip), clip + 0.3 * torch.randn_like(clip)
    assert metrics.ssim(clip, clip).item() == pytest.approx(1) and metrics.gmsd(clip, clip).item() == 0
    assert metrics.ssim(slight, clip) > metrics.ssim(strong, clip) + 0.1
    assert metrics.gmsd(slight, clip) < metrics.gmsd(strong, clip) - 0.02


def test_rate_counts_bits_and_codes():
    ids = torch.tensor([[1, 2, 3], [1, 2, 7]])
    assert evaluate.rate(ids, 960, 8) == {"bits_per_pixel": 0.1, "codebook_use": 0.5}
    assert evaluate.rate(ids[:, :1], 960, 8) == {"bits_per_pixel": round(32 / 960, 6), "codebook_use": 0.125}


def test_held_out_states_the_rate_of_each_k():
    model = vft.Tokenizer(parse_config(SMALL))
    rows = evaluate.held_out(model, 2, [1, 3], steps=1)
    clips = evaluate._clips(model, range(2))
    ids = torch.cat(model.encode_latents(model.codec.encode(clips)))
    assert "bits_per_pixel" not in rows["codec"] and ids.shape == (2 * 5, 3)
    for k in (1, 3):
        # 17 frames of 16 x 16 in 5 latent frames
        assert rows[str(k)]["bits_per_pixel"] == round(16 * 5 * k / (17 * 16 * 16), 6)
        assert rows[str(k)]["codebook_use"] == round(len(ids[:, :k].unique()) / 64000, 6) > 0


def test_budgets():
    assert evaluate.budgets(32) == [1, 2, 4, 8, 16, 32]
    assert evaluate.budgets(5) == [1, 2, 4, 5]
    assert evaluate.budgets(1) == [1]


def test_control_finds_the_register_that_matters(monkeypatch):
    """A decoder that shows its first register alone."""
    model = vft.Tokenizer(parse_config(SMALL))

    def first_register(ids, **_):
        return [i[:, :1, None, None].float().expand(-1, 16, 2, 2).permute(1, 0, 2, 3) / 1000 for i in ids]

    monkeypatch.setattr(model, "decode_latents", first_register)
    shares = evaluate.control(model, 4)
    assert shares == pytest.approx([1, 0, 0], abs=1e-5)


def command(tmp_path, clips: int) -> list[str]:
    """``vft eval`` of a small tokenizer, into out.json."""
    torch.manual_seed(0)
    vft.Tokenizer(parse_config(SMALL), "small").save(tmp_path / "small.safetensors")
    paths = ["--model", str(tmp_path / "small.safetensors"), "-o", str(tmp_path / "out.json")]
    return ["eval", *paths, "--clips", str(clips)]


def test_the_command(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 20, "loss": 2.0}\n{"step": 40, "loss": 1.5}\n')
    arguments = command(tmp_path, 3)
    assert cli.main([*arguments, "--steps", "1", "--run", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["rate_distortion"]["held-out clips"]) == ["codec", "1", "2", "3"]
    assert result["training_loss"] == {tmp_path.name: [[20, 2.0], [40, 1.5]]} and len(result["control"]) == 3
    assert f"{result['rate_distortion']['bunny.mp4']['3']['psnr']:.2f}" in capsys.readouterr().out
    assert cli.main([*arguments, "--run", str(tmp_path), str(tmp_path / ".")]) == 2
    assert "must have different names" in capsys.readouterr().err
    assert cli.main([*arguments[:-1], "1"]) == 2
    assert "must be at least 2, got 1" in capsys.readouterr().err


def test_the_command_with_a_generator(tmp_path, monkeypatch, capsys):
    given, trained = {}, []
    monkeypatch.setattr(evaluate.classifier, "train", lambda *_, **amount: trained.append(amount) or "judge")
    monkeypatch.setattr(
        evaluate,
        "class_accuracy",
        lambda g, t, judge, n, **more: given.update(more, judge=judge, n=n) or {"held_out": 1},
    )
    monkeypatch.setattr(evaluate, "generator_loss", lambda *_: 4.5)
    arguments = [*command(tmp_path, 2), "--generator", "tiny"]
    assert cli.main([*arguments, "--temperature", "0.7"]) == 0
    assert given == {"temperature": 0.7, "judge": "judge", "n": 2}
    motion, named = classifier.MOTION, classifier.NAMED
    assert trained == [{"steps": 100, "clips": 500, "subject": motion}]
    assert "training a classifier of motion on 500 procedural clips, 100 steps" in capsys.readouterr().err
    evaluate.judge(vft.Tokenizer.from_pretrained("tiny"), 128, named)
    assert "a classifier of colour and shape and motion on 12000" in capsys.readouterr().err
    evaluate.judge(vft.Tokenizer.from_pretrained("tiny"), 512)
    assert trained[1:] == [
        {"steps": 1250, "clips": 12000, "subject": named}, {"steps": 2500, "clips": 24000, "subject": motion},
    ]  # fmt: skip
    assert cli.main([*arguments, "--temperature", "-1"]) == 2
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["temperature"], result["class_accuracy"]) == (0.7, {"held_out": 1})
    assert result["generator_loss"] == 4.5


def test_the_command_with_a_generator_of_captions(tmp_path, monkeypatch, capsys):
    rows = {"held_out": {"colour": 0.75, "all": 0.5}, "generated": {"colour": 0.625, "all": 0.375}}
    monkeypatch.setattr(evaluate.classifier, "train", lambda *_, subject, **amount: subject)
    # asked of the classifier of words, and of no other
    monkeypatch.setattr(
        evaluate, "word_accuracy", lambda g, t, judge, n, **_: rows if judge is classifier.NAMED else None
    )
    monkeypatch.setattr(evaluate, "class_accuracy", None)
    monkeypatch.setattr(evaluate, "generator_loss", lambda g, t, n: n / 3)
    assert cli.main([*command(tmp_path, 2), "--generator", "tiny_text"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["word_accuracy"] == rows and "class_accuracy" not in result
    shown = capsys.readouterr().out
    assert "words shown, generated: colour 0.625, all 0.375" in shown
    assert result["generator_loss"] == 0.6667 and "nats a token of held-out clips: 0.667" in shown


def test_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from vft import plots

    lines, save = {}, plots._save

    def look(page, output):
        lines.update({axis.get_title(): len(axis.lines) for axis in page.axes})
        save(page, output)

    monkeypatch.setattr(plots, "_save", look)
    rows = {str(k): {"psnr": 10.0 + k, "ssim": 0.5, "gmsd": 0.1} for k in (1, 2)}
    result = {"rate_distortion": {"clips": rows | {"codec": rows["2"]}}, "control": [0.5, 0.1]}
    result |= {"class_accuracy": {"held_out": 0.9}, "training_loss": {"a": [(1, 2.0)], "b": [(1, 3.0)]}}
    rows = {"held_out": {"colour": 0.9, "all": 0.5}, "generated": {"colour": 0.8, "all": 0.4}}
    plots.evaluation(result | {"word_accuracy": rows}, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 800
    assert (lines["Training loss, a"], lines["Training loss, b"]) == (2, 2)
    assert lines["PSNR, dB"] == 2 and "Class accuracy of clips" in lines
    assert "Clips that show what words name" in lines


def test_a_classifier_learns():
    model = classifier.train(32, 9, steps=40, clips=60)
    seen = range(60)
    clips = procedural.batch(classifier.SEED, seen, 32, 9)
    labels = torch.tensor([procedural.label(classifier.SEED, i) for i in seen])
    assert model.accuracy(clips, labels) > 0.4


def test_generator_loss_is_that_of_held_out_tokens(monkeypatch):
    tokenizer, seen = vft.Tokenizer.from_pretrained("tiny"), []

    def logits(self, flat, **condition):
        seen.append((flat, condition))
        # as likely as e to one for the first half of the positions, sure of the second
        scale = torch.ones(flat.shape[1], 1).index_fill_(0, torch.arange(flat.shape[1] // 2, flat.shape[1]), 100.0)
        return scale * torch.nn.functional.one_hot(flat, 64000).float()

    monkeypatch.setattr(vft.Generator, "logits", logits)
    loss = evaluate.generator_loss(vft.Generator.from_pretrained("tiny"), tokenizer, 9)
    assert loss == pytest.approx(math.log(1 + 63999 / math.e) / 2, rel=1e-4)
    assert [len(flat) for flat, _ in seen] == [8, 1]
    labels = [procedural.label(evaluate.HELD_OUT_SEED, i) for i in range(9)]
    assert [c for _, condition in seen for c in condition["class_id"]] == labels
    clip = procedural.batch(evaluate.HELD_OUT_SEED, [8])
    ids = tokenizer.encode(clip).ids
    assert torch.equal(seen[1][0][0], ids[:, : seen[1][0].shape[1] // 5].T.flatten())
    evaluate.generator_loss(vft.Generator.from_pretrained("tiny_text"), tokenizer, 1)
    emb, mask = embed([named.caption(evaluate.HELD_OUT_SEED, 0)])
    assert torch.equal(seen[2][1]["text_emb"], emb) and torch.equal(seen[2][1]["text_mask"], mask)


@pytest.mark.parametrize("move", [(0, 0), (2, -3), (-1, 1)])
def test_what_moved_fits_best_where_it_went(move):
    still = torch.rand(2, 3, 1, 16, 16)
    x = torch.cat([torch.roll(still, (i * move[0], i * move[1]), (3, 4)) for i in range(3)], 2)
    errors = classifier.matches(x)
    reach = classifier.REACH
    side = 2 * reach + 1
    assert errors.shape == (2, side * side, 2, 16, 16)
    best = errors.argmin(1)[..., 4:-4, 4:-4]
    assert (best == (move[0] + reach) * side + move[1] + reach).all()
    # what is the same all over fits everywhere alike
    assert classifier.matches(torch.ones(1, 3, 2, 16, 16)).abs().max() < 1e-6


def test_class_accuracy_is_that_of_the_judge():
    class Judge:
        """Says right of real clips alone."""

        def __init__(self):
            self.seen = []

        def accuracy(self, clips, labels):
            self.seen.append(clips)
            assert len(clips) == len(labels) == 6 and clips.shape[1:] == (3, 17, 64, 64)
            return float(len(self.seen) == 3)

    judge, tokenizer = Judge(), vft.Tokenizer.from_pretrained("tiny")
    generator = vft.Generator.from_pretrained("tiny")
    result = evaluate.class_accuracy(generator, tokenizer, judge, 6, guidances=(1.0, 3.0), temperature=0.5)
    assert result == {"held_out": 1.0, "reconstructed": 0.0, "generated": 0.0, "guidance 3": 0.0}
    plain, guided, real, seen = judge.seen
    assert metrics.psnr(seen, real).mean() > 14 and not torch.equal(plain, guided)


def test_a_classifier_of_words_learns(monkeypatch):
    """Three heads of one network, of clips that are not mirrored: left is not right."""
    monkeypatch.setattr(classifier, "_mirrored", None)
    named, seen = classifier.NAMED, range(80)
    model = classifier.train(32, 9, steps=60, clips=80, subject=named)
    labels = named.labels(classifier.SEED, seen)
    right = model.right(named.clips(classifier.SEED, seen, 32, 9), labels)
    assert right.shape == labels.shape == (80, 3)
    # by chance 1/8, 1/4, 1/8
    assert (right.float().mean(0) > torch.tensor([0.4, 0.35, 0.25])).all(), right.float().mean(0)
    with pytest.raises(ValueError, match="one question"):
        model.accuracy(torch.zeros(1, 3, 9, 32, 32), labels[:1, 0])
    assert named.facts(classifier.SEED, 3) == tuple(
        answers[i] for answers, i in zip(named.questions.values(), labels[3], strict=True)
    )


def test_word_accuracy_is_that_of_the_judge():
    class Judge:
        """Says that colours are right, shapes every second time, and motions of the clips that were made."""

        def __init__(self):
            self.seen = []

        def right(self, clips, labels):
            self.seen.append(clips)
            right = torch.ones_like(labels).bool()
            right[::2, 1] = False
            right[:, 2] = len(self.seen) <= 2
            return right

    config = {
        "depth": 1, "vocab": 64000, "seq_len": 40, "cond": "text", "ctx_dim": 64, "n_ctx_null": 1, "tokenizer": "tiny",
    }  # fmt: skip
    torch.manual_seed(0)
    generator = vft.Generator(parse_generator_config(config)).eval()
    asked, generate = [], generator.generate

    def look(**options):
        asked.append(options)
        return generate(**options)

    generator.generate = look
    judge, tokenizer = Judge(), vft.Tokenizer.from_pretrained("tiny")
    result = evaluate.word_accuracy(generator, tokenizer, judge, 6, guidances=(1.0, 3.0), top_k=9)
    half = {"colour": 1.0, "shape": 0.5, "motion": 1.0, "all": 0.5}
    none = half | {"motion": 0.0, "all": 0.0}
    assert result == {"held_out": none, "reconstructed": none, "generated": half, "guidance 3": half}
    plain, guided, real, seen = judge.seen
    assert metrics.psnr(seen, real).mean() > 14 and not torch.equal(plain, guided)
    wanted = " ".join(classifier.NAMED.facts(evaluate.HELD_OUT_SEED, 1))
    emb, mask = embed([wanted])
    assert torch.equal(asked[0]["text_emb"][1][asked[0]["text_mask"][1]], emb[0][mask[0]])
    assert [options["guidance"] for options in asked] == [1.0, 3.0] and asked[0]["top_k"] == 9


def test_what_cannot_be_judged_is_named():
    common = {"depth": 1, "vocab": 64, "seq_len": 8}
    for raw, message in (
        (
            {"cond": "text", "ctx_dim": 512, "n_ctx_null": 1},
            "captions of vft.words, 64 channels, .* got 512",
        ),
        ({"cond": "class", "n_classes": 3}, "the classes pan, .* to be judged, got 3 classes"),
        ({"cond": "class", "n_classes": 8, "classes": list(MOTIONS)}, "the classes pan, .* got moving left, "),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.subject(vft.Generator(parse_generator_config(common | raw)))
    assert evaluate.subject(vft.Generator.from_pretrained("tiny")) is classifier.MOTION


def test_the_classifier_needs_whole_latent_frames():
    with pytest.raises(ValueError, match=r"clips must have 1 \+ 4 k frames, k > 0, got 8"):
        classifier.shrink(torch.zeros(1, 3, 8, 32, 32))


def test_a_thinned_curve_keeps_means_and_the_last_step():
    curve = [(step, float(step)) for step in range(1, 8)]
    assert evaluate.thinned(curve, 7) == curve
    assert evaluate.thinned(curve, 3) == [(3, 2.0), (6, 5.0), (7, 7.0)]
