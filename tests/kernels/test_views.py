"""How a tensor lies in memory changes no bit of any op's result: each tensor of a call in turn becomes a view."""

import re

import pytest
import torch
from helpers import emulated, on_every_backend
from op_examples import EXAMPLES, examples
from torch.utils._pytree import tree_flatten, tree_unflatten

import flexkernels
from flexkernels import library

# what a kernel reads from the gaps of a view, if it does
POISON = {torch.float32: float("nan"), torch.int32: 2**30, torch.int64: 2**60}


def apart(t):
    """Rows, or numbers, further apart than they need be."""
    gap = torch.full_like(t, POISON[t.dtype])
    return torch.stack([t, gap], -1)[..., 0] if t.dim() == 1 else torch.cat([t, gap], -1)[..., : t.shape[-1]]


def columns(t):
    """The last dimension has the largest stride."""
    backwards = tuple(range(t.dim()))[::-1]
    return t.permute(backwards).contiguous().permute(backwards)


def shifted(t):
    """Not aligned to more than its own type."""
    wide = torch.full((t.numel() + 1,), POISON[t.dtype], dtype=t.dtype)
    wide[1:] = t.flatten()
    return wide[1:].view(t.shape)


def schema_calls(name):
    """The arguments of every call that the op's examples make of it."""
    calls, real = [], library.Op.__call__

    def record(op, *args):
        if op.name == name:
            calls.append(args)
        return real(op, *args)

    library.Op.__call__ = record
    try:
        for example in examples(name):
            with torch.no_grad(), flexkernels.backend("reference"):
                example.ours(*example.tensors)
    finally:
        library.Op.__call__ = real
    return calls


def results(op, leaves, spec):
    """What the op returns, and its tensors after the call."""
    args = tree_unflatten(leaves, spec)
    returned = op(*args)
    return [t.clone() for t in tree_flatten((returned, args))[0] if isinstance(t, torch.Tensor)]


def fresh(leaves):
    return [t.clone(memory_format=torch.contiguous_format) if isinstance(t, torch.Tensor) else t for t in leaves]


@on_every_backend
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_views_give_the_bits_of_contiguous_tensors(place, name):
    if place[0] == "reference" or library.OPS[name].plain:
        pytest.skip("PyTorch's own sums depend on strides")
    op, tried = library.OPS[name], 0
    calls = schema_calls(name)
    assert calls
    with torch.no_grad(), flexkernels.backend(place[0]):
        for args in calls[:1] if emulated(place) else calls:
            leaves, spec = tree_flatten(args)
            try:
                want = results(op, fresh(leaves), spec)
            except RuntimeError as refusal:
                if "cannot serve this call" not in str(refusal):
                    raise
                pytest.skip(str(refusal))
            for i, leaf in enumerate(leaves):
                if not isinstance(leaf, torch.Tensor) or leaf.numel() < 2:
                    continue
                for view in (apart, columns, shifted):
                    given = fresh(leaves)
                    given[i] = view(given[i])
                    try:
                        got = results(op, given, spec)
                    except (ValueError, RuntimeError) as refusal:
                        # of what is written in place, or made once by its owner
                        assert view is not shifted and re.search(r" must (be contiguous|have stride 1)", str(refusal))
                        continue
                    where = f"argument {i}, {tuple(leaf.shape)}: {view.__name__}"
                    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=where)
                    tried += 1
    assert tried
