"""`decode_attention` over 16-bit caches on CUDA: tensor cores, splits merged by the block that arrives last."""

import math

import emulator
import pytest
import torch
from helpers import assert_accurate, emulated, needs_gpu, on_cuda

import flexkernels
from flexkernels import decode_attention_ref

HALVES = (torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype)


def attend(place, q, k, v, lengths, weight=None, **settings):
    values = (q, k, v, torch.tensor(lengths, dtype=torch.int32))
    with flexkernels.backend(place[0]):
        weight = None if weight is None else weight.to(place[1])
        settings |= {"key_log_weight": weight, "return_lse": True}
        return tuple(x.cpu() for x in flexkernels.decode_attention(*(x.to(place[1]) for x in values), **settings))


def schedules(place):
    """Turns in each of which blocks and warps run in another order."""
    for seed in range(4):
        if emulated(place):
            emulator.load_ops().seed(seed)
        yield seed


@on_cuda
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "head_dim", "lengths"),
    [
        # three tiles of rows, the last of 2; two splits
        (2, 17, 1, 64, [300]),
        # each head_dim there is a kernel for, with one tile of 8 rows and with two
        (1, 1, 1, 128, [140, 1]),
        (5, 2, 1, 128, [140]),
        (1, 2, 2, 256, [130, 64]),
        (3, 3, 1, 256, [130]),
        # more splits than warps
        (1, 1, 1, 8, [2400, 2304]),
        (2, 2, 1, 96, [1200]),
        # rows that are not whole packs
        (4, 3, 1, 33, [270]),
        (1, 2, 1, 130, [129]),
    ],
)
def test_both_products_and_every_tile(place, dtype, n, heads, kv_heads, head_dim, lengths):
    batch, max_len, group = len(lengths), max(lengths) + 3, heads // kv_heads
    q = draw(batch, n, heads, head_dim, dtype=dtype)
    k, v = (draw(batch, kv_heads, max_len, head_dim, dtype=dtype) for _ in range(2))
    weight = torch.randn(batch, max_len)
    args = (q, k, v, torch.tensor(lengths, dtype=torch.int32))
    exact, exact_lse = decode_attention_ref(
        *(x.double() for x in args[:3]), args[3], key_log_weight=weight.double(), return_lse=True
    )
    # plain PyTorch in this dtype: weights of the softmax and the result are rounded
    plain = exact.clone()
    for b, length in enumerate(lengths):
        kk, vv = (x[b, :, :length].repeat_interleave(group, 0) for x in (k, v))
        scores = (q[b].transpose(0, 1) @ kk.transpose(1, 2)) * head_dim**-0.5 + weight[b, :length].to(dtype)
        unseen = torch.arange(length) >= length - n + 1 + torch.arange(n)[:, None]
        plain[b] = (scores.masked_fill(unseen, -math.inf).softmax(-1) @ vv).transpose(0, 1)
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = math.nan
    out, lse = attend(place, q, k, v, lengths, weight)
    assert_accurate(out, plain.to(dtype), exact)
    # sums of 16-bit products in float32, weights of two 16-bit numbers: far closer than one rounding of a weight
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert (out.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max() + 1e-6


@on_cuda
def test_every_schedule_gives_the_same_bits(place):
    """Whichever block arrives last merges, and leaves the counters at 0: calls of other shapes follow."""
    cases = [(1, 1, 64, [700, 256, 0]), (3, 4, 64, [1100]), (2, 9, 128, [257, 5])]
    inputs = []
    for n, group, head_dim, lengths in cases:
        caches = (draw(len(lengths), 2, 1100, head_dim) for _ in range(2))
        inputs.append((draw(len(lengths), n, 2 * group, head_dim), *caches, lengths))
    first = None
    for _ in schedules(place):
        results = [attend(place, *args) for args in inputs]
        first = first or results
        for result, expected in zip(results, first, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@on_cuda
@pytest.mark.parametrize("head_dim", [64, 20])
def test_a_row_has_the_bits_it_has_alone(place, head_dim):
    """Alone: one head, one query, one sequence, a cache that ends where the query's keys do."""
    lengths, n, group = [258, 600], 3, 4
    q, k, v = draw(2, n, 2 * group, head_dim), draw(2, 2, 600, head_dim), draw(2, 2, 600, head_dim)
    out, lse = attend(place, q, k, v, lengths)
    for b, query, head in ((0, 0, 0), (0, 1, 5), (0, 2, 7), (1, 0, 3), (1, 2, 4)):
        seen = lengths[b] - n + 1 + query
        cache = [x[b : b + 1, head // group, None, :seen] for x in (k, v)]
        one, one_lse = attend(place, q[b : b + 1, query, None, head, None], *cache, [seen])
        assert torch.equal(one.flatten(), out[b, query, head]) and torch.equal(
            one_lse.flatten(), lse[b, query, head, None]
        )


@on_cuda
def test_any_strides_give_the_same_bits(place):
    """Rows on 16 bytes are loaded as packs, others element by element."""
    wide_q, wide = draw(2, 3, 2, 41).to(place[1]), draw(2, 290, 2, 2, 41).to(place[1])
    q, k, v = wide_q[..., 1:], wide[:, :, 0, :, 1:].transpose(1, 2), wide[:, :, 1, :, :40].transpose(1, 2)
    assert all(x.stride(2 if x is q else 1) % 8 for x in (q, k, v))
    dense = [x.contiguous() for x in (q, k, v)]
    for expected, found in zip(attend(place, *dense, [290, 7]), attend(place, q, k, v, [290, 7]), strict=True):
        assert torch.equal(expected, found)
    same = draw(1, 8, 8, 64).to(place[1])
    copies = attend(place, *(same.clone() for _ in range(3)), [8])
    assert all(torch.equal(a, b) for a, b in zip(attend(place, same, same, same, [8]), copies, strict=True))


@on_cuda
def test_nothing_seen_and_numbers_that_are_none(place):
    q, k, v = draw(3, 2, 2, 16), draw(3, 1, 300, 16), draw(3, 1, 300, 16)
    # a neighbour's NaN stays there; query 0 of sequence 1 sees no key
    k[0], v[0] = math.nan, math.nan
    out, lse = attend(place, q, k, v, [300, 1, 0])
    assert out[0].isnan().all() and lse[0].isnan().all()
    for nothing, weight in ((out[1, 0], lse[1, 0]), (out[2], lse[2])):
        assert (nothing == 0).all() and (weight == -math.inf).all()
    assert torch.equal(out[1, 1], v[1, :, 0].expand(2, -1)) and lse[1, 1].isfinite().all()
    # hidden keys: all of one split, then all of them
    weight = torch.zeros(3, 300)
    weight[:, :256] = -math.inf
    out, lse = attend(place, q[1:], k[1:], v[1:], [300, 200], weight[1:])
    want, want_lse = attend(place, q[1:2], k[1:2, :, 256:], v[1:2, :, 256:], [44])
    torch.testing.assert_close(out[:1], want, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse[:1], want_lse, rtol=1e-5, atol=1e-5)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    # one key has all the weight; infinite scores have no softmax
    large, _ = attend(place, 1e4 * q[1:2], k[1:2], v[1:2], [300], causal=False)
    best = (q[1, 0, 0].float() @ k[1, 0].float().T).argmax()
    assert torch.equal(large[0, 0, 0], v[1, 0, best])
    k[1, 0, 299] = math.inf
    assert attend(place, q[1:2].abs(), k[1:2], v[1:2], [300], causal=False)[0].isnan().all()


@needs_gpu
def test_graphs_that_run_at_the_same_time():
    """A graph has counters of its own: two graphs and the stream they were captured on do not disturb each other."""
    q, k, v = (x.cuda() for x in (draw(2, 1, 16, 64), draw(2, 16, 4096, 64), draw(2, 16, 4096, 64)))
    lengths = torch.tensor([4096, 3000], dtype=torch.int32, device="cuda")
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    results = []
    with flexkernels.backend("cuda"):
        expected = flexkernels.decode_attention(q, k, v, lengths)
        for graph in graphs:
            with torch.cuda.graph(graph):
                results.append([flexkernels.decode_attention(q, k, v, lengths) for _ in range(3)])
        streams = [torch.cuda.Stream() for _ in graphs]
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            results.append([flexkernels.decode_attention(q, k, v, lengths)])
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for outs in results for out in outs)
