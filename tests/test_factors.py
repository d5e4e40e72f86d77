"""Generators stored with factored token tables: what is read, what is refused, and the embedded one's name."""

import pytest
import torch
from safetensors.torch import load_file

import vft
from vft import checkpoint, factors
from vft.config import parse_generator_config

RAW = {"depth": 1, "vocab": 60, "seq_len": 8, "cond": "class", "n_classes": 2, "classes": ["a", "b"]}


@pytest.fixture
def tensors():
    """A generator's tensors with the tables as float32 factors of rank 4."""
    torch.manual_seed(0)
    full = vft.Generator(parse_generator_config(RAW)).published()
    for table in factors.TABLES:
        del full[f"{table}.weight"]
        full[f"{table}.factors.0"], full[f"{table}.factors.1"] = torch.randn(60, 4), torch.randn(4, 64)
    return full


def read(path, tensors, rank=4, dtype=None):
    checkpoint.write_tensors(path, tensors, RAW | {"factor_rank": rank}, dtype)
    return vft.Generator.from_pretrained(path)


def test_factors_become_the_published_tables(tmp_path, tensors):
    gen = read(tmp_path / "a.safetensors", tensors)
    assert torch.equal(gen.tok_emb.weight, tensors["tok_emb.factors.0"] @ tensors["tok_emb.factors.1"])
    assert torch.equal(gen.head.weight, tensors["head.factors.0"] @ tensors["head.factors.1"])
    assert gen.config == parse_generator_config(RAW)
    half = read(tmp_path / "b.safetensors", tensors, dtype=torch.float16)
    assert (half.head.weight - gen.head.weight).abs().max() < 2e-2


def test_compressed_factors(tmp_path, tensors):
    gen = read(tmp_path / "a.safetensors", tensors)
    tensors["head.factors.0"][7] = 0
    tensors["head.factors.0"][8] = 1e-3
    compact = read(tmp_path / "b.safetensors", factors.compress(tensors), dtype=torch.float16)
    stored = load_file(tmp_path / "b.safetensors")
    assert stored["tok_emb.factors.0"].dtype == torch.int8 and stored["tok_emb.factors.0.scale"].dtype == torch.float16
    # half a step of the row's int8 grid, and the rounding of the second factor to float16
    first, second = tensors["head.factors.0"], tensors["head.factors.1"]
    bound = (first.abs().amax(1, keepdim=True) / 254) @ second.abs().sum(0, keepdim=True) * 1.02 + 1e-2
    want = first @ second
    assert ((compact.head.weight - want).abs() <= bound).all()
    assert (compact.head.weight[7] == 0).all()
    torch.testing.assert_close(compact.head.weight[8], want[8], rtol=1e-2, atol=1e-5)
    assert gen.config == compact.config


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        (0, {}, "factor_rank must be an int of at least 1, got 0"),
        ("4", {}, "factor_rank must be an int of at least 1, got '4'"),
        (5, {}, r"tok_emb.factors must be \[rows, 5\] and \[5, width\], got \[60, 4\] and \[4, 64\]"),
        (4, {"head.factors.1": None}, "lacks the key head.factors.1"),
        (4, {"head.factors.1": torch.zeros(4)}, r"head.factors must be"),
        (4, {"head.factors.0": torch.zeros(60, 4, dtype=torch.int8)}, "lacks the key head.factors.0.scale"),
        (
            4,
            {"head.factors.0": torch.zeros(60, 4, dtype=torch.int8), "head.factors.0.scale": torch.ones(4)},
            r"head.factors.0.scale must have shape \[60\], got \[4\]",
        ),
        (4, {"head.factors.0": torch.zeros(50, 4)}, r"head.weight must have shape \[60, 64\], got \[50, 64\]"),
        (4, {"head.weight": torch.zeros(60, 64)}, "head.weight must not be given beside its factors"),
    ],
)
def test_bad_factors(tmp_path, tensors, rank, change, message):
    changed = {name: value for name, value in (tensors | change).items() if value is not None}
    with pytest.raises(checkpoint.CheckpointError, match=message):
        read(tmp_path / "a.safetensors", changed, rank)


@pytest.mark.parametrize("rank", [3, 9, 12])
def test_fsq_features(rank):
    levels = (2, 5, 4)
    features = factors.fsq_features(levels, rank)
    assert features.shape == (40, rank) and features.dtype == torch.float32
    # the columns of single codes, and of pairs of codes
    exact = features[:, : sum(levels) - 3 + 3].double()
    # orthonormal under the uniform distribution of ids, and without mean
    torch.testing.assert_close(exact.T @ exact / 40, torch.eye(exact.shape[1]).double(), rtol=0, atol=1e-5)
    assert exact.mean(0).abs().max() < 1e-5
    second, third = torch.arange(40) // 2 % 5, torch.arange(40) // 10
    if rank >= 8:
        # any function of one code is a constant and a combination of the columns
        assert error_of_fit(exact[:, :8], torch.randn(5).double()[second]) < 1e-5
    if rank >= 11:
        assert (
            error_of_fit(exact, (second * third).double())
            < 1e-5
            < error_of_fit(exact[:, :8], (second * third).double())
        )


def error_of_fit(columns, values):
    basis = torch.cat([torch.ones(len(columns), 1).double(), columns], 1)
    return (basis @ torch.linalg.lstsq(basis, values[:, None]).solution)[:, 0].sub(values).abs().max()


def test_the_embedded_generator_is_found_by_its_name(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"must be an embedded model \(none\), a directory"):
        vft.Generator.from_pretrained("tiny")
    (tmp_path / "codec.safetensors").touch()
    (tmp_path / "tiny.safetensors").touch()
    want = read(tmp_path / "tiny_generator.safetensors", factors.compress(tensors), dtype=torch.float16)
    assert torch.equal(vft.Generator.from_pretrained("tiny").head.weight, want.head.weight)
    assert vft.Generator.from_pretrained("tiny").name == "tiny"
    assert checkpoint.embedded_models() == ["tiny"] == checkpoint.embedded_models(checkpoint.GENERATOR)
    with pytest.raises(checkpoint.CheckpointError, match=r"an embedded model \(tiny\)"):
        vft.Generator.from_pretrained("small")
