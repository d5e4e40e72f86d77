"""FVD, FID and LPIPS: their formulae in another arithmetic, networks of the user, and the table."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vft import Tokenizer, cli, plots, video
from vft.config import make_config, parse_config
from vft.evaluate import comparison, write_table
from vft.features import Network, clip_score, frechet_distance, lpips_distance


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 8), (40, 50, 64), (2, 3, 5)])
def test_frechet_distance_is_the_published_formula(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(d)
    a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    b = 0.5 + rng.normal(size=(m, d)) @ rng.normal(size=(d, d))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    if n > d and m > d:
        root = linalg.sqrtm(first @ second).real
    else:
        # the product is singular there: by the root of one of them
        values, vectors = np.linalg.eigh(first)
        half = vectors * np.sqrt(values.clip(0)) @ vectors.T
        root = np.sqrt(np.linalg.eigvalsh(half @ second @ half).clip(0))
    trace = np.trace(root) if root.ndim == 2 else root.sum()
    want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * trace
    got = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert got == pytest.approx(want, rel=1e-6)
    assert frechet_distance(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(a)) < 1e-6 * want


def test_frechet_distance_of_one_dimension():
    # N(0, 1) and N(3, 4): 3^2 + (2 - 1)^2
    a = torch.tensor([[-1.0], [1.0]]) / 2**0.5
    assert frechet_distance(a, 3 + 2 * a) == pytest.approx(10)
    for bad in (torch.zeros(1, 1), torch.zeros(3, 2), torch.tensor([[0.0], [float("nan")]])):
        with pytest.raises(ValueError, match="b must be"):
            frechet_distance(a, bad)


def test_lpips_is_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 6, 5), (2, 7, 3, 3)]
    a, b = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    weights = [torch.rand(s[1], generator=generator) for s in shapes]
    want = np.zeros(2)
    for x, y, w in zip(a, b, weights, strict=True):
        x, y, w = x.double().numpy(), y.double().numpy(), w.double().numpy()
        for i in range(2):
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    p, q = x[i, :, row, column], y[i, :, row, column]
                    p, q = p / (np.sqrt((p**2).sum()) + 1e-10), q / (np.sqrt((q**2).sum()) + 1e-10)
                    want[i] += (w * (p - q) ** 2).sum() / (x.shape[2] * x.shape[3])
    assert lpips_distance(a, b, weights).double().numpy() == pytest.approx(want, rel=1e-6)
    assert lpips_distance(a, a, weights).tolist() == [0, 0]
    with pytest.raises(ValueError, match="as many layers, got 2, 1 and 2"):
        lpips_distance(a, b[:1], weights)
    with pytest.raises(ValueError, match="with C weights"):
        lpips_distance(a, b, weights[::-1])


def test_clip_score_is_the_cosine():
    a, b = np.random.default_rng(0).normal(size=(2, 4, 7))
    want = [x @ y / np.sqrt(x @ x) / np.sqrt(y @ y) for x, y in zip(a, b, strict=True)]
    assert clip_score(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(want, rel=1e-6)
    assert clip_score(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])).item() == pytest.approx(1)
    assert clip_score(torch.tensor([[3.0, 4.0]]), torch.tensor([[-4.0, 3.0]])).item() == pytest.approx(0)
    with pytest.raises(ValueError, match=r"embeddings \[N, D\], got \[4, 7\] and \[4, 6\]"):
        clip_score(torch.ones(4, 7), torch.ones(4, 6))
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="text must have finite embeddings other than 0"):
            clip_score(torch.ones(1, 3), torch.full((1, 3), bad))


class Video(nn.Module):
    def forward(self, x):
        return x.mean(4).mean(3).flatten(1)[:, :6]


class Frames(nn.Module):
    def forward(self, x):
        return x.mean(3).mean(2)


class Maps(nn.Module):
    def forward(self, x):
        return [x, nn.functional.avg_pool2d(x, 2)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, net in (("video.pt", Video()), ("frames.pt", Frames()), ("maps.pt", Maps())):
        torch.jit.script(net).save(tmp_path / name)
    save_file({"lin0": torch.ones(1, 3, 1, 1), "lin1": torch.full((3,), 2.0)}, tmp_path / "lin.safetensors")
    config = make_config(codec="linear", encoder_width=32, decoder_width=32, head_dim=32, registers=2, size=16)
    Tokenizer(parse_config(config), "small").save("small.safetensors")
    return tmp_path


def test_eval_writes_distances_their_protocol_and_a_table(files, capsys):
    argv = ["eval", "--model", "small.safetensors", "-o", "a.json", "--clips", "3", "--steps", "1", "--video"]
    metrics = ["--metrics", "fvd=video.pt", "fid=frames.pt", "lpips=maps.pt,lin.safetensors"]
    pytest.importorskip("matplotlib")
    other = {"model": "other", "rate_distortion": {"held-out clips": {"1": {"psnr": 20.0}, "codec": {"psnr": 30.0}}}}
    (files / "other.json").write_text(json.dumps(other))
    assert cli.main([*argv, *metrics, "--table", "a.csv", "a.md"]) == 0
    assert cli.main([*argv, "--table", "both.csv", "both.png", "--beside", "other.json"]) == 0
    over = ["eval", "--model", "small.safetensors", "-o", "other.json", "--table", "c.md", "--beside", "other.json"]
    assert cli.main(over) == 2 and json.loads((files / "other.json").read_text()) == other
    both = list(csv.DictReader((files / "both.csv").open()))
    assert [(row["model"], row["k"]) for row in both[:3]] == [("other", "1"), ("other", "codec"), ("small", "codec")]
    assert (files / "both.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*argv, *metrics]) == 0
    result = json.loads((files / "a.json").read_text())
    protocol = result["distances"]["protocol"]
    assert (protocol["clips"], protocol["frames"], protocol["stride"], protocol["size"]) == (3, 17, 1, 16)
    assert [len(protocol["networks"][kind]) for kind in ("fvd", "fid", "lpips")] == [1, 1, 2]
    assert set(result["distances"]["rows"]) == {"codec", "1", "2"}
    assert all(value > 0 for row in result["distances"]["rows"].values() for value in row.values())
    rows = list(csv.DictReader((files / "a.csv").open()))
    assert [row["k"] for row in rows] == ["codec", "1", "2"] and rows[1]["model"] == "small"
    assert float(rows[2]["fvd"]) == pytest.approx(result["distances"]["rows"]["2"]["fvd"], rel=1e-5)
    lines = (files / "a.md").read_text().splitlines()
    assert (
        lines[0] == "| model | k | psnr | ssim | gmsd | fvd | fid | lpips | bits_per_pixel | codebook_use |"
        and len(lines) == 5
    )
    capsys.readouterr()


def test_eval_scores_captioned_videos(files, capsys):
    for i, name in enumerate(("a.mp4", "b.mp4")):
        pixels = torch.full((5, 16, 16, 3), 60 + 130 * i, dtype=torch.uint8)
        pixels[..., i] = 255
        video.write_video(files / name, pixels, 10)
    # of 6 numbers the network gives the first two channels of 5 frames: what a.mp4 has in them, and its opposite
    network = Network("fvd", [files / "video.pt"])
    shown = {name: video.preprocess(video.read_video(name, 16).frames, 16)[None] for name in ("a.mp4", "b.mp4")}
    own = {name: network.features(x)[0].contiguous() for name, x in shown.items()}
    save_file({"a.mp4": own["a.mp4"], "b.mp4": -own["b.mp4"]}, files / "captions.safetensors")
    metrics = ["--metrics", "viclip=video.pt,captions.safetensors"]
    argv = ["eval", "--model", "small.safetensors", "-o", "a.json", "--clips", "2", "--steps", "1", *metrics, "--video"]
    assert cli.main([*argv, "a.mp4", "b.mp4", "--table", "a.csv"]) == 0
    result = json.loads((files / "a.json").read_text())
    rows, protocol = result["captions"]["rows"], result["captions"]["protocol"]
    assert list(rows) == ["source", "1", "2"] and rows["source"]["viclip"] == pytest.approx(0, abs=1e-6)
    assert (protocol["videos"], protocol["frames"], protocol["score"]) == (
        ["a.mp4", "b.mp4"],
        [5, 5],
        "cosine, unscaled",
    )
    assert [f["file"] for f in protocol["networks"]["viclip"]] == ["video.pt", "captions.safetensors"]
    each = [result["rate_distortion"][name]["2"]["viclip"] for name in ("a.mp4", "b.mp4")]
    assert rows["2"]["viclip"] == pytest.approx(sum(each) / 2) and each[0] != each[1]
    tokenizer = Tokenizer.from_pretrained("small.safetensors")
    decoded = tokenizer.decode(tokenizer.encode(video.read_video("a.mp4", 16)), keep=2, steps=1)
    assert each[0] == pytest.approx(float(clip_score(network.features(decoded), own["a.mp4"][None])), abs=1e-6)
    table = list(csv.DictReader((files / "a.csv").open()))
    assert table[0]["viclip"] == "" and float(table[2]["viclip"]) == pytest.approx(rows["2"]["viclip"], rel=1e-5)
    for videos, message in (
        (["a.mp4", str(files / "gone.mp4")], "captions.safetensors must have an embedding named 'gone.mp4'"),
        (["a.mp4", "a.mp4"], "metric viclip needs video files of different names"),
        ([], "metric viclip needs video files"),
    ):
        capsys.readouterr()
        assert cli.main([*argv, *videos]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_several_models_make_one_table(tmp_path):
    one = {"model": "a", "rate_distortion": {"held-out clips": {"1": {"psnr": 20.0}}}}
    two = {
        "model": "b",
        "rate_distortion": {"held-out clips": {"1": {"psnr": 21.5}}},
        "distances": {"rows": {"1": {"fvd": 3.0}}},
    }
    write_table(comparison([one, two]), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines() == ["model,k,psnr,fvd", "a,1,20,", "b,1,21.5,3"]


def test_a_picture_of_several_models(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pages = []
    monkeypatch.setattr(plots, "_save", lambda page, output: pages.append(page))
    rows = [
        {"model": "a", "k": "codec", "psnr": 30.0}, {"model": "a", "k": "1", "psnr": 20.0},
        {"model": "b", "k": "1", "psnr": 21.5, "fvd": 3.0}, {"model": "b", "k": "2", "psnr": 23.0, "fvd": 2.0},
    ]  # fmt: skip
    plots.comparison(rows, tmp_path / "t.png")
    (page,) = pages
    psnr, fvd = page.axes
    assert (psnr.get_title(), fvd.get_title()) == ("PSNR, dB", "FVD")
    drawn = {line.get_label(): list(line.get_ydata()) for line in psnr.get_lines()}
    assert drawn == {"a": [20.0], "codec alone": [30.0, 30.0], "b": [21.5, 23.0]}
    assert [(line.get_label(), list(line.get_ydata())) for line in fvd.get_lines()] == [("b", [3.0, 2.0])]


def test_wrong_networks(files, capsys):
    (files / "bad.pt").write_text("no network")
    for text, message in (
        ("fvd", "metrics must be NAME=FILE[,FILE], got 'fvd'"),
        ("kvd=video.pt", "metric must be one of fvd, fid, lpips, viclip, got 'kvd'"),
        ("viclip=video.pt", "metric viclip needs a TorchScript file and a safetensors file of captions' embeddings"),
        ("fvd=gone.pt", "gone.pt: No such file"),
        ("fvd=bad.pt", "bad.pt: not a TorchScript file"),
        ("lpips=maps.pt", "metric lpips needs a TorchScript file and a safetensors file of weights, got 1 files"),
        ("lpips=maps.pt,bad.pt", "bad.pt must be a complete safetensors file"),
    ):
        assert cli.main(["eval", "-o", "a.json", "--metrics", text]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert cli.main(["eval", "-o", "a.json", "--metrics", "fvd=video.pt", "fvd=video.pt"]) == 2
    assert "--metrics must name each metric once" in capsys.readouterr().err
    assert cli.main(["eval", "-o", "a.json", "--table", "a.txt"]) == 2
    assert "table must end in .csv, .md or .png" in capsys.readouterr().err
    assert cli.main(["eval", "-o", "a.json", "--beside", "bad.pt"]) == 2
    assert "bad.pt: not a result of vft eval" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"the network of fvd must give features \[B, D\], got list"):
        Network("fvd", [files / "maps.pt"]).features(torch.zeros(1, 3, 4, 16, 16).transpose(0, 2)[0])
