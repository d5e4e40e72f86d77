"""Token tables linear in features of FSQ codes: the features, the loss without logits, what is read and refused."""

import pytest
import torch
import torch.nn.functional as F

import vft
from vft import checkpoint, codebook
from vft.codebook import TABLES, CodebookEmbedding, CodebookHead, codebook_cross_entropy, fsq_features
from vft.config import parse_generator_config

LEVELS = (3, 5, 4)
RAW = {"depth": 1, "vocab": 60, "seq_len": 8, "cond": "class", "n_classes": 2, "classes": ["a", "b"]}


def test_fsq_features():
    features = fsq_features((2, 5, 4))
    # 1 + 4 + 3 columns of single codes, 3 of pairs
    assert features.shape == (40, 11) and features.dtype == torch.float32
    exact = features.double()
    # orthonormal under the uniform distribution of ids, and without mean
    torch.testing.assert_close(exact.T @ exact / 40, torch.eye(11).double(), rtol=0, atol=1e-5)
    assert exact.mean(0).abs().max() < 1e-5
    first, second, third = torch.arange(40) % 2, torch.arange(40) // 2 % 5, torch.arange(40) // 10
    # the first column of each code rises with it, as do its highest powers at the last level
    for column, code in zip(exact.T[:3], (first, second, third), strict=True):
        assert torch.corrcoef(torch.stack([column, code.double()]))[0, 1] > 0.999
    assert exact[-1].min() > 0
    # any function of one code is a constant and a combination of the columns
    assert error_of_fit(exact[:, :8], torch.randn(5).double()[second]) < 1e-5
    product = (second * third).double()
    assert error_of_fit(exact, product) < 1e-5 < error_of_fit(exact[:, :8], product)


def error_of_fit(columns, values):
    basis = torch.cat([torch.ones(len(columns), 1).double(), columns], 1)
    return (basis @ torch.linalg.lstsq(basis, values[:, None]).solution)[:, 0].sub(values).abs().max()


def test_tables_compute_their_products():
    embedding, head = CodebookEmbedding(LEVELS, 64), CodebookHead(LEVELS, 64)
    ids, x = torch.tensor([[3, 59], [0, 3]]), torch.randn(7, 64)
    torch.testing.assert_close(embedding(ids), (embedding.features @ embedding.projection)[ids])
    torch.testing.assert_close(head(x), x @ (head.features @ head.projection).T)
    assert [name for name, _ in head.named_parameters()] == list(head.state_dict()) == ["projection"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("rows", "levels"), [(1, (2,)), (37, (8, 8, 5, 5)), (200, (3, 5, 4)), (130, (8, 8, 8, 5))])
def test_codebook_cross_entropy(monkeypatch, dtype, parts, rows, levels):
    """Whole, and with the ids in parts, one of them empty where there are two ids."""
    monkeypatch.setattr(codebook, "id_parts", lambda *_: parts)
    features = fsq_features(levels)
    # of strided rows, with confident and flat ones among them
    h = (torch.randn(rows, 2 * features.shape[1])[:, ::2] * torch.linspace(0.01, 2, rows)[:, None]).to(dtype)
    ids, weight = torch.randint(len(features), (rows,)), torch.rand(rows)

    def both(function, h, features):
        h = h.detach().requires_grad_()
        loss = function(h, features, ids)
        return loss.detach(), torch.autograd.grad((loss * weight).sum(), h)[0]

    plain = lambda h, f, ids: F.cross_entropy((h @ f.to(h.dtype).T).to(max_float(h)), ids, reduction="none")  # noqa: E731
    # the features are rounded to h's dtype by either
    exact = both(plain, h.double(), features.to(dtype).double())
    ours, theirs = both(codebook_cross_entropy, h, features), both(plain, h, features)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        # instructions for bfloat16 round sums of products on the way
        step = (8 if dtype == torch.float32 else 32) * torch.finfo(got.dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (peer - want).abs().max() + step


def test_parts_of_the_ids_fill_a_gpu(monkeypatch):
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    # 20 blocks of rows, two blocks for each of 132; few ids; more rows than fill it; no rows
    assert [codebook.id_parts(*sizes, gpu) for sizes in ((1280, 64000), (1, 64000), (1, 60), (9000, 64000))] == [
        13,
        62,
        1,
        1,
    ]
    assert codebook.id_parts(0, 64000, gpu) >= 1 == codebook.id_parts(1280, 64000, cpu)


def max_float(x):
    return torch.promote_types(x.dtype, torch.float32)


def test_codebook_cross_entropy_of_no_rows_and_again():
    features = fsq_features(LEVELS)
    empty = torch.zeros(0, features.shape[1], requires_grad=True)
    loss = codebook_cross_entropy(empty, features, torch.zeros(0, dtype=torch.long))
    assert loss.shape == (0,) and torch.autograd.grad(loss.sum(), empty)[0].shape == empty.shape
    h, ids = torch.randn(50, features.shape[1]), torch.randint(60, (50,))
    assert torch.equal(codebook_cross_entropy(h, features, ids), codebook_cross_entropy(h, features, ids))


def test_the_gradient_reaches_the_projection_and_x():
    torch.manual_seed(0)
    head, x, ids = CodebookHead(LEVELS, 64), torch.randn(9, 64, requires_grad=True), torch.randint(60, (9,))
    ours = torch.autograd.grad(head.cross_entropy(x, ids).mean(), (x, head.projection))
    theirs = torch.autograd.grad(F.cross_entropy(head(x), ids), (x, head.projection))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.fixture
def tensors():
    """A generator's tensors with projections in place of the tables."""
    torch.manual_seed(0)
    full = vft.Generator(parse_generator_config(RAW)).published()
    for table in TABLES:
        del full[f"{table}.weight"]
        full[f"{table}.projection"] = torch.randn(fsq_features(LEVELS).shape[1], 64)
    return full


def read(path, tensors, levels=LEVELS, dtype=None):
    checkpoint.write_tensors(
        path, tensors, RAW | {"fsq_levels": list(levels) if isinstance(levels, tuple) else levels}, dtype
    )
    return vft.Generator.from_pretrained(path)


def test_projections_become_the_published_tables(tmp_path, tensors):
    gen = read(tmp_path / "a.safetensors", tensors)
    for table in TABLES:
        want = fsq_features(LEVELS) @ tensors[f"{table}.projection"]
        assert torch.equal(getattr(gen, table).weight, want)
    assert gen.config == parse_generator_config(RAW)
    half = read(tmp_path / "b.safetensors", tensors, dtype=torch.float16)
    assert (half.head.weight - gen.head.weight).abs().max() < 2e-2
    # saved whole, read again
    gen.save(tmp_path / "full.safetensors")
    again = vft.Generator.from_pretrained(tmp_path / "full.safetensors")
    assert torch.equal(again.head.weight, gen.head.weight) and again.config == gen.config


@pytest.mark.parametrize(
    ("levels", "change", "message"),
    [
        ([3, 5], {}, r"fsq_levels must be ints above 1 whose product is vocab, got \[3, 5\]"),
        ([60, 1], {}, "fsq_levels must be ints above 1"),
        ([3.0, 5, 4], {}, "fsq_levels must be ints above 1"),
        ("abc", {}, "fsq_levels must be ints above 1"),
        ([], {}, "fsq_levels must be ints above 1"),
        ([4, 15], {}, r"tok_emb.projection must be \[18, width\], got \[12, 64\]"),
        (list(LEVELS), {"head.projection": None}, "lacks the key head.projection"),
        (list(LEVELS), {"head.projection": torch.zeros(12)}, r"head.projection must be \[12, width\], got \[12\]"),
        (list(LEVELS), {"head.projection": torch.zeros(12, 32)}, r"head.weight must have shape \[60, 64\]"),
        (list(LEVELS), {"head.weight": torch.zeros(60, 64)}, "head.weight must not be given beside head.projection"),
    ],
)
def test_bad_projections(tmp_path, tensors, levels, change, message):
    changed = {name: value for name, value in (tensors | change).items() if value is not None}
    with pytest.raises(checkpoint.CheckpointError, match=message):
        read(tmp_path / "a.safetensors", changed, levels)


def test_the_embedded_generator_is_found_by_its_name(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"must be an embedded model \(none\), a directory"):
        vft.Generator.from_pretrained("tiny")
    (tmp_path / "codec.safetensors").touch()
    (tmp_path / "tiny.safetensors").touch()
    want = read(tmp_path / "tiny_generator.safetensors", tensors, dtype=torch.float16)
    assert torch.equal(vft.Generator.from_pretrained("tiny").head.weight, want.head.weight)
    assert vft.Generator.from_pretrained("tiny").name == "tiny"
    assert checkpoint.embedded_models() == ["tiny"] == checkpoint.embedded_models(checkpoint.GENERATOR)
    with pytest.raises(checkpoint.CheckpointError, match=r"an embedded model \(tiny\)"):
        vft.Generator.from_pretrained("small")
