"""The layout for Hugging Face's kernels: built as kernel-builder does, loaded beside this package, the same results."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from paths import ROOT

import flexkernels

ID = "_flexkernels_0a1b2c3"
# as kernel-builder writes it
OPS = f'''import torch
ops = torch.ops.{ID}
def add_op_namespace_prefix(op_name: str):
    return f"{ID}::{{op_name}}"
'''


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """A build of the generated layout for the CPU."""
    folder = tmp_path_factory.mktemp("kernel")
    subprocess.run([sys.executable, str(ROOT / ".ci" / "hub_kernel"), str(folder)], check=True)
    built = folder / "build" / "torch-cpu"
    shutil.copytree(folder / "torch-ext" / "flexkernels", built)
    (built / "_ops.py").write_text(OPS)
    return built


@pytest.fixture(scope="module")
def kernel(variant):
    spec = importlib.util.spec_from_file_location(ID, variant / "__init__.py")
    module = sys.modules[ID] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_says_what_it_is(variant):
    tomllib = pytest.importorskip("tomllib")
    text = (variant.parents[1] / "build.toml").read_text()
    build = tomllib.loads(text)
    assert build["general"]["name"] == "flexkernels" and build["general"]["version"] == 0
    assert "torch-noarch" in build and not [p for p in variant.rglob("*") if p.suffix in (".so", ".cpp", ".cu")]
    sources = "\n".join(path.read_text() for path in variant.rglob("*.py"))
    assert "\nfrom flexkernels" not in sources and "\nimport flexkernels" not in sources


def test_its_ops_are_its_own_and_give_the_same(kernel):
    assert kernel is not flexkernels and kernel.available_backends()["cpu"] is not None
    assert hasattr(getattr(torch.ops, ID), "fsq_quantize")
    torch.manual_seed(0)
    z, x, weight = torch.randn(50, 3), torch.randn(12, 16), torch.randn(16)
    q, cache, length = torch.randn(2, 1, 2, 8), torch.randn(2, 2, 6, 8), torch.tensor([3, 6], dtype=torch.int32)

    def results(ops):
        layout = ops.SequenceLayout([[(4, 2)] * 2], "frame_causal")
        packed = x.view(12, 2, 8)
        yield from ops.fsq_quantize(z, (8, 5, 5))
        yield ops.rms_norm(x, weight)
        yield ops.flow_update([x], [1.0], x, b=-0.5)[0]
        yield ops.decode_attention(q, cache, cache, length)
        yield ops.attention(packed, packed, packed, layout)

    with flexkernels.backend("reference"):
        wanted = list(results(flexkernels))
    for ours, theirs in zip(wanted, results(kernel), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_gradients_and_compile(kernel):
    x = torch.randn(4, 8, requires_grad=True)
    kernel.rms_norm(x, torch.ones(8)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    compiled = torch.compile(lambda z: kernel.fsq_quantize(z, (8, 5, 5))[1], backend="eager", fullgraph=True)
    z = torch.randn(7, 3)
    assert compiled(z).equal(flexkernels.fsq_quantize(z, (8, 5, 5))[1])


def test_the_kernels_package_loads_it(variant, monkeypatch):
    kernels = pytest.importorskip("kernels")
    facts = {
        "id": f"{ID}_hub", "name": "flexkernels", "version": 0, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cpu"},
    }  # fmt: skip
    copy = variant.parents[1] / "loaded" / "build" / "torch-cpu"
    shutil.copytree(variant, copy)
    (copy / "_ops.py").write_text(OPS.replace(ID, f"{ID}_hub"))
    (copy / "metadata.json").write_text(json.dumps(facts))
    loaded = kernels.get_local_kernel(copy.parents[1], backend="cpu")
    assert loaded.fsq_quantize(torch.zeros(2, 1), [3])[1].tolist() == [1, 1]
