import math

import pytest
import torch
from helpers import DEVICE, FLOATS, assert_accurate, inductor, interpreted, needs_gpu, on_every_backend, repeat_at_level
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import flexkernels
from flexkernels import library

op = torch.ops.flexkernels


def draw(*shape, dtype=torch.float32):
    # drawn in its own dtype, on the CPU
    return torch.randn(shape).to(dtype)


def to(device, *values):
    return [None if value is None else value.to(device) for value in values]


def sdpa(q, k, v, length, scale, weight, causal):
    """One sequence the plain way, in its own dtype: q [n, heads, head_dim], k, v [kv_heads, max_len, head_dim]."""
    n, heads, _ = q.shape
    k, v = (x[:, :length].repeat_interleave(heads // k.shape[0], 0) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale
    if weight is not None:
        scores = scores + weight[:length].to(scores.dtype)
    if causal:
        seen = (torch.arange(length) < length - n + 1 + torch.arange(n)[:, None]).to(scores.device)
        scores = scores.masked_fill(~seen, -math.inf)
    p = torch.softmax(scores, -1).nan_to_num(0)
    return (p @ v).transpose(0, 1), torch.logsumexp(scores.double(), -1).T


def expected(q, k, v, lengths, scale, weight, causal, dtype):
    rows = [
        sdpa(*(x[b].to(dtype) for x in (q, k, v)), length, scale, None if weight is None else weight[b], causal)
        for b, length in enumerate(lengths)
    ]
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def attend(place, q, k, v, lengths, *, weight=None, **settings):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    with flexkernels.backend(place[0]):
        result = flexkernels.decode_attention(
            *to(place[1], q, k, v, lengths), key_log_weight=None if weight is None else weight.to(place[1]), **settings
        )
    return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()


def poison(cache, lengths):
    """NaN where nothing was appended yet: it must never be read."""
    for b, length in enumerate(lengths):
        cache[b, :, length:] = math.nan
    return cache


def check_attention(
    place, n, heads, kv_heads, head_dim, lengths, max_len, dtype, causal=True, weighted=False, close=False
):
    batch, scale = len(lengths), head_dim**-0.5
    q = draw(batch, n, heads, head_dim, dtype=dtype)
    k, v = (draw(batch, kv_heads, max_len, head_dim, dtype=dtype) for _ in range(2))
    weight = torch.randn(batch, max_len) if weighted else None
    exact, exact_lse = expected(q, k, v, lengths, scale, weight, causal, torch.float64)
    # where the kernels run: other libraries sum in another order
    plain, _ = expected(*to(place[1], q, k, v), lengths, scale, *to(place[1], weight), causal, dtype)
    k, v = poison(k, lengths), poison(v, lengths)
    out, lse = attend(place, q, k, v, lengths, weight=weight, causal=causal, return_lse=True)
    if close:
        # a search for the worst case finds some where the plain formula happens to be nearly exact
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=2e-6)
    elif interpreted(place) and dtype == torch.bfloat16:
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    else:
        assert_accurate(out, plain, exact)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 2e-2)
    assert torch.equal(attend(place, q, k, v, lengths, weight=weight, causal=causal), out)


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "head_dim", "lengths", "max_len"),
    [
        (1, 4, 4, 64, [1, 300, 17], 301),
        (1, 2, 1, 128, [0, 256, 257], 600),
        (2, 8, 1, 40, [2, 129], 151),
        (16, 2, 2, 17, [16, 270], 270),
        (3, 4, 2, 256, [1, 2, 40], 40),
        (5, 1, 1, 1, [5, 7], 9),
    ],
)
def test_attention_is_accurate(place, dtype, n, heads, kv_heads, head_dim, lengths, max_len):
    check_attention(place, n, heads, kv_heads, head_dim, lengths, max_len, dtype)
    check_attention(place, n, heads, kv_heads, head_dim, lengths, max_len, dtype, causal=False, weighted=True)


@pytest.mark.parametrize("n", range(1, 17))
def test_every_number_of_new_tokens(n):
    check_attention(("auto", DEVICE), n, 8, 2, 32, [n, 33, 512], 520, torch.float32)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=5),
    n=st.integers(1, 4),
    group=st.sampled_from([1, 2, 8]),
    head_dim=st.sampled_from([1, 8, 33, 64]),
    causal=st.booleans(),
    weighted=st.booleans(),
)
def test_ragged_lengths(lengths, n, group, head_dim, causal, weighted):
    place = ("auto", DEVICE)
    check_attention(place, n, 2 * group, 2, head_dim, lengths, 600, torch.float32, causal, weighted, close=True)


@on_every_backend
def test_a_row_does_not_depend_on_its_place_or_company(place):
    lengths = [300, 5, 0, 600, 257]
    q, k, v = draw(5, 2, 4, 24), draw(5, 2, 600, 24), draw(5, 2, 600, 24)
    together = attend(place, q, k, v, lengths, return_lse=True)
    order = [3, 1, 4, 0, 2]
    shuffled = attend(place, q[order], k[order], v[order], [lengths[b] for b in order], return_lse=True)
    for b, length in enumerate(lengths):
        alone = attend(place, q[b : b + 1], k[b : b + 1], v[b : b + 1], [length], return_lse=True)
        for whole, moved, one in zip(together, shuffled, alone, strict=True):
            assert torch.equal(whole[b], one[0]) and torch.equal(whole[b], moved[order.index(b)])
    again = attend(place, q, k, v, lengths, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads):
    q, k, v = draw(2, 1, 4, 64), draw(2, 4, 1100, 64), draw(2, 4, 1100, 64)
    before = torch.get_num_threads()
    out = attend(("auto", "cpu"), q, k, v, [1100, 600])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(attend(("auto", "cpu"), q, k, v, [1100, 600]), out)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_share_loads_have_the_bits_of_rows_alone(dtype, head_dim):
    """11 new tokens are tiles of 8 and 3 rows, each of several at a time; 570 keys end in part of a vector."""
    q, k, v = draw(1, 11, 1, head_dim, dtype=dtype), *draw(2, 1, 1, 570, head_dim, dtype=dtype)
    together = attend(("auto", "cpu"), q, k, v, [570], causal=False, return_lse=True)
    for i in range(11):
        alone = attend(("auto", "cpu"), q[:, i : i + 1], k, v, [570], causal=False, return_lse=True)
        assert all(torch.equal(a[:, i], b[:, 0]) for a, b in zip(together, alone, strict=True))


@on_every_backend
def test_strided_caches_and_queries(place):
    layers = draw(3, 2, 2, 2, 290, 24).to(place[1])
    k, v = layers[1, 0], layers[2, 1]
    text = draw(2, 290, 2, 24).to(place[1]).transpose(1, 2)
    q = draw(2, 4, 3, 24).to(place[1]).transpose(1, 2)
    assert not any(x.is_contiguous() for x in (text, q)) and k.stride(0) == v.stride(0)
    k = layers[:, 1][1].transpose(0, 1).contiguous().transpose(0, 1)
    assert not k.is_contiguous()
    for cache in (k, text):
        got = attend(place, q, cache, v, [290, 3])
        assert torch.equal(got, attend(place, q.contiguous(), cache.contiguous(), v.contiguous(), [290, 3]))


@on_every_backend
def test_nothing_to_see(place):
    q, k = draw(2, 3, 2, 8), poison(draw(2, 1, 300, 8), [0, 2])
    out, lse = attend(place, q, k, k, [0, 2], return_lse=True)
    # with 2 keys and 3 causal queries, the first query sees nothing
    for nothing, weight in ((out[0], lse[0]), (out[1, 0], lse[1, 0])):
        assert torch.equal(nothing, torch.zeros_like(nothing)) and (weight == -math.inf).all()
    assert torch.isfinite(lse[1, 1:]).all() and (out[1, 1:] != 0).all()
    hidden = torch.full((2, 300), -math.inf)
    out, lse = attend(place, q, k, k, [0, 2], weight=hidden, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    none = attend(place, q[:0], k[:0], k[:0], [], return_lse=True)
    assert none[0].shape == (0, 3, 2, 8) and none[1].shape == (0, 3, 2)
    assert (attend(place, q, k[:, :, :0], k[:, :, :0], [0, 0]) == 0).all()


@on_every_backend
def test_a_weight_counts_a_key_several_times(place):
    q, k, v = draw(1, 1, 2, 16), draw(1, 2, 6, 16), draw(1, 2, 6, 16)
    times = [1, 2, 3, 1, 4, 1]
    repeated = [x.repeat_interleave(torch.tensor(times), 2) for x in (k, v)]
    weight = torch.tensor([times]).float().log()
    out, lse = attend(place, q, k, v, [6], weight=weight, return_lse=True)
    want, want_lse = attend(place, q, *repeated, [12], return_lse=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-6)


@on_every_backend
def test_large_and_nan_scores(place):
    q, k, v = draw(1, 1, 1, 16), draw(1, 1, 300, 16), draw(1, 1, 300, 16)
    large = attend(place, 1e4 * q, k, v, [300])
    best = (k[0, 0] @ q[0, 0, 0]).argmax()
    torch.testing.assert_close(large[0, 0, 0], v[0, 0, best], rtol=1e-5, atol=1e-5)
    k[0, 0, 7] = math.nan
    assert attend(place, q, k, v, [300]).isnan().all()


@on_every_backend
def test_softmax_scale(place):
    q, k, v = draw(1, 1, 2, 16), draw(1, 2, 30, 16), draw(1, 2, 30, 16)
    want = attend(place, 2 * q, k, v, [30])
    torch.testing.assert_close(attend(place, q, k, v, [30], softmax_scale=0.5), want, rtol=1e-6, atol=1e-6)


# kv_append_


def tables(rows, head_dim):
    angle = torch.arange(rows)[:, None] * 10000.0 ** (-torch.arange(head_dim // 2) / max(head_dim // 2, 1))
    return angle.cos(), angle.sin()


def formula(x, norm, weight, eps, angles):
    """Norm and rotation of [..., heads, head_dim] in the dtype of x, through complex numbers; angles [..., 1, half]."""
    if norm == "layer":
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    if norm == "rms":
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)
    if weight is not None:
        x = x * weight.to(x.dtype)
    if angles is None:
        return x
    half, wide = x.shape[-1] // 2, torch.float64 if x.dtype == torch.float64 else torch.float32
    c, s = (table.to(wide) for table in angles)
    turned = torch.complex(*x.to(wide).split(half, -1)) * torch.complex(c, s)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


NORMS = [(None, False), ("layer", False), ("layer", True), ("rms", True)]


def norm_settings(norm, weighted, head_dim, rope, rows, place):
    weights = [1 + 0.1 * torch.randn(head_dim) if weighted else None for _ in range(2)]
    rope = tables(rows, head_dim) if rope and head_dim % 2 == 0 else None
    call = dict(norm=norm, eps=1e-3, rope=None if rope is None else tuple(to(place[1], *rope)))
    call |= dict(zip(("q_weight", "k_weight"), to(place[1], *weights), strict=True))
    return weights, rope, call


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("norm", "weighted"), NORMS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "n", "rope"), [(4, 2, 64, 1, True), (3, 1, 10, 4, True), (18, 1, 17, 2, False)]
)
def test_append_writes_its_positions_and_no_other(place, dtype, norm, weighted, heads, kv_heads, head_dim, n, rope):
    lengths, max_len = [n, 33, 50], 50
    weights, rope, call = norm_settings(norm, weighted, head_dim, rope, max_len, place)
    qkv = draw(3, n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    caches = draw(2, 3, kv_heads, max_len, head_dim, dtype=dtype)
    got = caches.to(place[1])
    with flexkernels.backend(place[0]):
        cache_len = torch.tensor(lengths, dtype=torch.int32, device=place[1])
        q = flexkernels.kv_append_(qkv.to(place[1]), *got, cache_len, heads=heads, **call)
    got, position = got.cpu(), torch.tensor(lengths)[:, None] - n + torch.arange(n)
    angles = None if rope is None else [table[position][:, :, None] for table in rope]
    exact, plain = ([], [])
    for results, wide in ((exact, torch.float64), (plain, dtype)):
        q_in, k_in, v_in = qkv.to(wide).unflatten(2, (-1, head_dim)).split([heads, kv_heads, kv_heads], 2)
        results += [formula(x, norm, w, 1e-3, angles) for x, w in zip((q_in, k_in), weights, strict=True)]
    row = torch.arange(3)[:, None]
    written = got[0][row, :, position]
    for result, formula_result, exact_result in zip((q.cpu(), written), plain, exact, strict=True):
        if interpreted(place) and dtype == torch.bfloat16:
            torch.testing.assert_close(result.double(), exact_result, rtol=1e-2, atol=1e-2)
        else:
            assert_accurate(result, formula_result, exact_result)
    assert torch.equal(got[1][row, :, position], v_in)
    for before, after in zip(caches, got, strict=True):
        after[row, :, position] = before[row, :, position]
        assert torch.equal(before, after)


@on_every_backend
def test_append_into_views_from_strided_input(place):
    layers = torch.zeros(2, 3, 2, 2, 9, 4, device=place[1])
    k, v = (layers[:, i, 1].transpose(0, 1).contiguous().transpose(0, 1) for i in range(2))
    qkv = draw(2, 3, 2 * 32).to(place[1])[..., ::2][:, :2]
    lengths = torch.tensor([2, 9], dtype=torch.int32, device=place[1])
    with flexkernels.backend(place[0]):
        q = flexkernels.kv_append_(qkv, k, v, lengths, heads=4, norm="layer")
        k2, v2 = torch.zeros(2, 2, 9, 4, device=place[1]), torch.zeros(2, 2, 9, 4, device=place[1])
        q2 = flexkernels.kv_append_(qkv.contiguous(), k2, v2, lengths, heads=4, norm="layer")
    assert torch.equal(q, q2) and torch.equal(k, k2) and torch.equal(v, v2)
    assert (k2 != 0).sum() == v2.count_nonzero() == 2 * 2 * 2 * 4


@on_every_backend
def test_append_of_nothing(place):
    k = torch.zeros(2, 1, 5, 4, device=place[1])
    lengths = torch.tensor([0, 5], dtype=torch.int32, device=place[1])
    with flexkernels.backend(place[0]):
        q = flexkernels.kv_append_(torch.zeros(2, 0, 16, device=place[1]), k, k.clone(), lengths, heads=2)
        assert q.shape == (2, 0, 2, 4)
        q = flexkernels.kv_append_(torch.zeros(0, 1, 16, device=place[1]), k[:0], k[:0], lengths[:0], heads=2)
        assert q.shape == (0, 1, 2, 4)


@pytest.mark.parametrize("length", [0, 6, -1])
def test_append_never_leaves_the_cache(length):
    k, v = torch.zeros(2, 2, 1, 5, 4, device=DEVICE)
    lengths = torch.tensor([length, 5], dtype=torch.int32, device=DEVICE)
    qkv = torch.ones(2, 1, 16, device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=f"cache_len must lie between 1 and 5, got {length}"):
            flexkernels.kv_append_(qkv, k, v, lengths, heads=2)
        assert k.count_nonzero() == v.count_nonzero() == 0
    else:
        flexkernels.kv_append_(qkv, k, v, lengths, heads=2)
        assert k[0].count_nonzero() == 0 and k[1].count_nonzero() == 4


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("length", [0, 6, -1])
def test_kernels_skip_a_sequence_that_does_not_fit(backend, length):
    """What a GPU does, where nothing looks at the lengths before."""
    if flexkernels.available_backends()[backend]:
        pytest.skip(f"{backend} cannot run here")
    storage = torch.zeros(3, 2, 1, 5, 4, device=DEVICE)
    rope = to(DEVICE, *tables(5, 4))
    lengths = torch.tensor([length, 5], dtype=torch.int32, device=DEVICE)
    kernel = library.OPS["kv_append_"]._backend(backend, torch.device(DEVICE))
    qkv = torch.ones(2, 1, 16, device=DEVICE)
    q = kernel(qkv, storage[1], storage[1].clone(), lengths, 2, 0, None, None, 1e-5, *rope)
    assert storage.count_nonzero() == storage[1, 1, 0, 4].count_nonzero() == 4
    assert torch.isfinite(q).all()


# qk_norm


def normed(place, qkv, *args, grads=None, **call):
    """q, k, v and, given gradients of the three, those of qkv and the weights."""
    qkv = qkv.to(place[1]).requires_grad_(grads is not None)
    leaves = [call.get(name) for name in ("q_weight", "k_weight")]
    leaves = [qkv, *(w.requires_grad_(grads is not None) for w in leaves if w is not None)]
    with flexkernels.backend(place[0]):
        out = flexkernels.qk_norm(qkv, *args, **call)
        if grads is None:
            return out
        return out, torch.autograd.grad(out, leaves, to(place[1], *grads))


def exact_norm(qkv, heads, kv_heads, head_dim, norm, weights, angles, dtype):
    """The formula in `dtype`, with leaves that can be differentiated."""
    leaves = [None if x is None else x.detach().cpu().to(dtype).requires_grad_() for x in (qkv, *weights)]
    q, k, v = leaves[0].unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    out = [formula(x, norm, w, 1e-3, angles) for x, w in zip((q, k), leaves[1:], strict=True)]
    return [*out, v], [leaf for leaf in leaves if leaf is not None]


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("norm", "weighted"), NORMS)
@pytest.mark.parametrize(
    ("total", "heads", "kv_heads", "head_dim", "rope"),
    [(37, 4, 4, 64, True), (5, 3, 1, 10, True), (3, 18, 2, 129, False), (2, 2, 1, 256, True)],
)
def test_norm_and_its_gradient(place, dtype, norm, weighted, total, heads, kv_heads, head_dim, rope):
    weights, rope, call = norm_settings(norm, weighted, head_dim, rope, 50, place)
    positions = torch.randint(50, (total,), dtype=torch.int32)
    angles = None if rope is None else [table[positions.long()][:, None] for table in rope]
    qkv = draw(total, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    grads = [draw(total, count, head_dim, dtype=dtype) for count in (heads, kv_heads, kv_heads)]
    if rope is not None:
        call["positions"] = positions.to(place[1])
    out, got = normed(place, qkv, heads, kv_heads, grads=grads, **call)
    exact, exact_leaves = exact_norm(qkv, heads, kv_heads, head_dim, norm, weights, angles, torch.float64)
    plain, plain_leaves = exact_norm(qkv, heads, kv_heads, head_dim, norm, weights, angles, dtype)
    loose = interpreted(place) and dtype == torch.bfloat16
    for result, formula_result, exact_result in zip(out, plain, exact, strict=True):
        if loose:
            torch.testing.assert_close(result.double(), exact_result, rtol=1e-2, atol=1e-2)
        else:
            assert_accurate(result.detach(), formula_result.detach(), exact_result.detach())
    want = torch.autograd.grad(exact, exact_leaves, [g.double() for g in grads])
    if not loose:
        assert_accurate(got[0], torch.autograd.grad(plain, plain_leaves, grads)[0], want[0])
    eps = torch.finfo(dtype).eps
    for result, exact_result in zip(got[1:], want[1:], strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.cpu().double(), exact_result, rtol=2e-5, atol=(1 if loose else 1e-4) + eps)
    again = normed(place, qkv, heads, kv_heads, grads=grads, **call)
    assert all(torch.equal(a, b) for a, b in zip((*out, *got), (*again[0], *again[1]), strict=True))


@on_every_backend
def test_norm_of_strided_rows_and_v_is_a_view(place):
    wide = draw(20, 3 * 48).to(place[1])
    qkv = wide[::2, 10 : 10 + 96]
    q, k, v = normed(place, qkv, 4)
    want = normed(place, qkv.contiguous(), 4)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), want, strict=True))
    assert v.data_ptr() == qkv[:, 64:].data_ptr() and torch.equal(v.flatten(1), qkv[:, 64:])
    columns = draw(96, 10).to(place[1]).t()
    assert torch.equal(normed(place, columns, 4)[0], normed(place, columns.contiguous(), 4)[0])
    same = normed(place, qkv, 4, norm=None)
    assert torch.equal(torch.cat(same, 1).flatten(1), qkv)


@on_every_backend
def test_norm_of_nothing_and_of_a_constant(place):
    weight = torch.ones(8, device=place[1])
    out, grads = normed(place, torch.zeros(0, 48), 2, q_weight=weight, grads=[torch.zeros(0, 2, 8)] * 3)
    assert [x.shape for x in out] == [(0, 2, 8)] * 3 and grads[0].shape == (0, 48)
    assert torch.equal(grads[1], torch.zeros_like(weight))
    q, k, _ = normed(place, torch.full((2, 48), 3.0), 2)
    assert (q == 0).all() and (k == 0).all()


def test_the_result_of_a_token_does_not_depend_on_the_others():
    qkv, rope, positions = (
        draw(40, 3 * 5 * 34).to(DEVICE),
        to(DEVICE, *tables(50, 34)),
        torch.arange(40).int().to(DEVICE),
    )
    whole = flexkernels.qk_norm(qkv, 5, rope=rope, positions=positions)
    part = flexkernels.qk_norm(qkv[7:20], 5, rope=rope, positions=positions[7:20])
    assert all(torch.equal(a[7:20], b) for a, b in zip(whole, part, strict=True))


# dispatch, tracing


def cache_case(dtype=torch.float32):
    q, cache = (
        torch.randn(2, 3, 4, 8, device=DEVICE, dtype=dtype),
        torch.randn(2, 2, 2, 9, 8, device=DEVICE, dtype=dtype),
    )
    return q, *cache, torch.tensor([3, 9], dtype=torch.int32, device=DEVICE)


def test_opcheck():
    q, k, v, lengths = cache_case()
    for weight in (None, torch.randn(2, 9, device=DEVICE)):
        torch.library.opcheck(op.decode_attention.default, (q, k, v, lengths, weight, 0.3, weight is None, True))
    qkv, (cos, sin) = torch.randn(2, 3, 64, device=DEVICE), to(DEVICE, *tables(9, 8))
    weight = torch.randn(8, device=DEVICE)
    torch.library.opcheck(op.kv_append_.default, (qkv, k, v, lengths, 4, 1, weight, None, 1e-5, cos, sin))
    qk, positions = torch.randn(6, 48, device=DEVICE), torch.arange(6, dtype=torch.int32, device=DEVICE)
    for total in (6, 0):
        x = qk[:total].clone().requires_grad_()
        w = weight.clone().requires_grad_()
        torch.library.opcheck(op.qk_norm.default, (x, 4, 2, 1, w, None, 1e-5, cos, sin, positions[:total]))
        torch.library.opcheck(op.qk_norm.default, (x, 4, 2, 2, None, None, 1e-5, None, None, None))
    heads = torch.randn(6, 4, 8, device=DEVICE), torch.randn(6, 2, 8, device=DEVICE)
    torch.library.opcheck(op.qk_norm_backward.default, (*heads, qk, 1, weight, weight, 1e-5, cos, sin, positions))


def step(qkv, k, v, lengths, cos, sin):
    q = flexkernels.kv_append_(qkv, k, v, lengths, heads=4, norm="rms", rope=(cos, sin))
    return flexkernels.decode_attention(2 * q, k, v, lengths) + 1


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
@torch.no_grad()
def test_a_decoding_step_compiles_to_one_graph(compiler):
    _, k, v, lengths = cache_case()
    qkv, rope = torch.randn(2, 3, 64, device=DEVICE), to(DEVICE, *tables(9, 8))
    k2, v2 = k.clone(), v.clone()
    want = step(qkv, k, v, lengths, *rope)
    got = torch.compile(step, fullgraph=True, backend=compiler)(qkv, k2, v2, lengths, *rope)
    assert torch.equal(k, k2) and torch.equal(v, v2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_norm_compiles_to_one_graph(compiler):
    def loss(qkv, weight):
        q, k, v = flexkernels.qk_norm(qkv, 4, 2, q_weight=weight)
        return (q[:, :2] * k * v.sin()).sum()

    qkv, weight = (
        torch.randn(6, 64, device=DEVICE, requires_grad=True),
        torch.randn(8, device=DEVICE, requires_grad=True),
    )
    want = torch.autograd.grad(loss(qkv, weight), (qkv, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(qkv, weight), (qkv, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_tensor_may_be_query_key_and_value():
    x = torch.randn(4, 48, device=DEVICE, requires_grad=True)
    q, k, v = flexkernels.qk_norm(x, 2)
    (q + k + v).sum().backward()
    want = torch.zeros_like(x)
    want[:, 32:] = 1
    # the layer norm of a sum of ones has gradient 0
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-5)


def test_fake_tensors_tell_shapes():
    with FakeTensorMode():
        q, k = torch.empty(2, 3, 4, 8, dtype=torch.float16), torch.empty(2, 2, 9, 8, dtype=torch.float16)
        lengths = torch.empty(2, dtype=torch.int32)
        out, lse = flexkernels.decode_attention(q, k, k, lengths, return_lse=True)
        assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, (2, 3, 4))
        assert flexkernels.kv_append_(torch.empty(2, 3, 64).half(), k, k, lengths, heads=4).shape == q.shape
        q, k, v = flexkernels.qk_norm(torch.empty(5, 64), 4, 2)
        assert [x.shape for x in (q, k, v)] == [(5, 4, 8), (5, 2, 8), (5, 2, 8)]


@needs_gpu
def test_cuda_graph_replays():
    qkv, k, v = (x.cuda() for x in (draw(2, 1, 64), draw(2, 2, 300, 8), draw(2, 2, 300, 8)))
    lengths, rope = torch.tensor([1, 299], dtype=torch.int32, device="cuda"), to("cuda", *tables(300, 8))
    step(qkv, k, v, lengths, *rope)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(qkv, k, v, lengths, *rope)
    lengths += 1
    qkv.normal_()
    graph.replay()
    k2, v2 = k.clone(), v.clone()
    assert torch.equal(out, step(qkv, k2, v2, lengths, *rope)) and torch.equal(k, k2)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_isa_level(level):
    """The tests of the C++ kernels once more, in a process that is held to `level`."""
    repeat_at_level(__file__, "cpu-cpu", level)


# wrong input

Q, K, L = torch.zeros(2, 1, 4, 8), torch.zeros(2, 2, 9, 8), torch.ones(2, dtype=torch.int32)
WRONG_ATTENTION = [
    (([1.0], K, K, L), {}, TypeError, "q must be a torch.Tensor, got list"),
    ((Q.double(), K, K, L), {}, TypeError, "q must be float32 or bfloat16 or float16, got float64"),
    ((Q[0], K, K, L), {}, ValueError, "q must have 4 dimensions"),
    ((Q, K.half(), K, L), {}, TypeError, "k_cache must be float32, got float16"),
    ((Q, K, K.half(), L), {}, TypeError, "v_cache must be float32, got float16"),
    ((Q, K[:1], K[:1], L), {}, ValueError, r"k_cache must have the shape \[2, kv_heads, max_len, 8\]"),
    ((Q, K, K[:, :, :8], L), {}, ValueError, "v_cache must have the shape"),
    ((Q, torch.zeros(2, 2, 8, 9).mT, K, L), {}, ValueError, "k_cache must have stride 1 in its last dimension, got 9"),
    ((Q[:, :, :3], K, K, L), {}, ValueError, "q must have a multiple of k_cache's 2 heads, got 3 heads"),
    ((Q[:, :0], K, K, L), {}, ValueError, "q must have 1 to 16 tokens a sequence, got 0"),
    ((Q.expand(2, 17, 4, 8), K, K, L), {}, ValueError, "q must have 1 to 16 tokens a sequence, got 17"),
    ((torch.zeros(2, 1, 4, 257), torch.zeros(2, 2, 9, 257), K, L), {}, ValueError, "head_dim must lie between 1 and"),
    ((Q, K, K, L.long()), {}, TypeError, "cache_len must be int32, got int64"),
    ((Q, K, K, L[:1]), {}, ValueError, r"cache_len must have the shape \[2\], got \[1\]"),
    ((Q, K, K, 10 * L), {}, ValueError, "cache_len must lie between 0 and 9, got 10"),
    ((Q, K, K, -L), {}, ValueError, "cache_len must lie between 0 and 9, got -1"),
    ((Q, K, K, L), {"key_log_weight": torch.zeros(2, 8)}, ValueError, r"key_log_weight must have the shape \[2, 9\]"),
    ((Q, K, K, L), {"key_log_weight": torch.zeros(2, 9).half()}, TypeError, "key_log_weight must be float32"),
    ((Q, K, K, L), {"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "call", "error", "message"), WRONG_ATTENTION)
def test_wrong_attention_is_refused(args, call, error, message):
    with pytest.raises(error, match=message):
        flexkernels.decode_attention(*args, **call)


X, W = torch.zeros(2, 1, 64), torch.ones(8)
ROPE = (torch.ones(9, 4), torch.zeros(9, 4))
WRONG_NORM = [
    ({"norm": "batch"}, ValueError, "norm must be None, 'layer' or 'rms', got 'batch'"),
    ({"norm": "rms", "eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ({"norm": None, "q_weight": W}, ValueError, "q_weight must be None without a norm"),
    ({"norm": "rms", "k_weight": W[:7]}, ValueError, r"k_weight must have the shape \[8\], got \[7\]"),
    ({"norm": "rms", "k_weight": W.double()}, TypeError, "k_weight must be float32 or bfloat16 or float16"),
    ({"rope": ROPE[0]}, TypeError, r"rope must be a pair \(cos, sin\), got Tensor"),
    ({"rope": (ROPE[0], ROPE[1][:8])}, ValueError, r"sin must have the shape \[9, 4\], got \[8, 4\]"),
    ({"rope": (ROPE[0].half(), ROPE[1])}, TypeError, "cos must be float32, got float16"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG_NORM)
def test_wrong_norm_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        flexkernels.kv_append_(X, K, K, L, **{"heads": 4, "norm": None, **call})
    with pytest.raises(error, match=message):
        flexkernels.qk_norm(X[:, 0], 4, 2, **{"positions": L if "rope" in call else None, **call})


def test_wrong_projection_is_refused():
    with pytest.raises(ValueError, match=r"qkv must have .* head_dim columns, 9 times 1 to 256"):
        flexkernels.kv_append_(X, K, K, L, heads=5)
    with pytest.raises(ValueError, match=r"k_cache must have the shape \[2, kv_heads, max_len, 16\]"):
        flexkernels.kv_append_(torch.zeros(2, 1, 128), K, K, L, heads=4)
    with pytest.raises(ValueError, match="rope must have at least max_len = 9 rows, got 8"):
        flexkernels.kv_append_(X, K, K, L, heads=4, rope=tuple(table[:8] for table in ROPE))
    for heads, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="heads must be"):
            flexkernels.qk_norm(X[:, 0], heads)
    with pytest.raises(ValueError, match="rope and positions must be given together"):
        flexkernels.qk_norm(X[:, 0], 4, 2, rope=ROPE)
    with pytest.raises(ValueError, match="positions must lie between 0 and 8, got 9"):
        flexkernels.qk_norm(X[:, 0], 4, 2, rope=ROPE, positions=9 * L)
    with pytest.raises(ValueError, match="head_dim must be even for a rotary embedding, got 9"):
        flexkernels.qk_norm(torch.zeros(2, 27), 1, rope=ROPE, positions=L)
