"""The compiled ops called directly: flow steps against PyTorch formulas at every ISA level."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexkernels import _native

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"no native kernels: {_native.cpu_unavailable}")

ops = torch.ops.flexkernels_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")


# --- guided flow step

DT, SCALE, THRESHOLD, ETA, MOMENTUM = -0.025, 25.0, 0.6, 0.3, -0.5


def row_formula(x, v_cond, v_uncond, buffer, guidance, threshold=THRESHOLD):
    """One row, in the dtype of its arguments: (x_next, d)."""
    v, d = v_cond, None
    if guidance == 1:
        v = v_uncond + SCALE * (v_cond - v_uncond)
    if guidance == 2:
        d = v_cond - v_uncond + (MOMENTUM * buffer if buffer is not None else 0)
        shrunk = d * min(1.0, threshold / float(d.norm())) if threshold > 0 and d.norm() > 0 else d
        unit = v_cond / v_cond.norm().clamp_min(1e-12)
        parallel = (shrunk * unit).sum() * unit
        v = v_cond + (SCALE - 1) * (shrunk - parallel + ETA * parallel)
    return x + DT * v, d


def flow_step(x, v_cond, v_uncond, buffer, offsets, guidance, prefix=None, prefix_offsets=None, noise=None,
              threshold=THRESHOLD, dt=DT, **changes):  # fmt: skip
    numbers = dict(a=[1.0], b=dt, past_b=[], guidance=guidance, scale=SCALE, threshold=threshold, eta=ETA)
    numbers |= dict(momentum=0.0 if buffer is None else MOMENTUM, rescale=0.0, prefix_time=0.25, return_velocity=False)
    tensors = (x, v_cond, v_uncond, buffer, offsets, prefix, prefix_offsets, noise)
    x_next, momentum_next, _ = torch.ops.flexkernels.flow_update(
        *tensors, **dict(scalars=None, more_x=[], past=[]) | numbers | changes
    )
    return x_next, momentum_next


def rows_of(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


RAGGED = rows_of(0, 1, 17, 129, 0, 151, 1000, 5120)


def check_flow(x_dtype, v_dtype, guidance, with_buffer, offsets, equal_rows=False, threshold=THRESHOLD):
    total, rows = int(offsets[-1]), len(offsets) - 1
    x = torch.randn(total).to(x_dtype)
    v_cond, v_uncond = torch.randn(2, total).to(v_dtype)
    buffer = torch.randn(total) if with_buffer else None
    given = [x, v_cond, v_uncond if guidance else None, buffer]
    if equal_rows:
        given = [t if t is None else t.view(1, rows, -1) for t in given]
    got, got_d = flow_step(*given, None if equal_rows else offsets, guidance, threshold=threshold)
    got, got_d = got.view(-1), got_d.view(-1)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        row = slice(begin, end)

        def formula(dtype, row=row):
            parts = [t[row].to(dtype) if t is not None else None for t in (x, v_cond, v_uncond, buffer)]
            return row_formula(*parts, guidance, threshold)

        exact, exact_d = formula(torch.float64)
        single = formula(torch.float32)[0].to(x_dtype).double()
        budget = 2 * (single - exact).abs().max() if end > begin else 0
        allowed = budget + 1e-6 * exact.abs() + torch.finfo(x_dtype).eps / 2 * exact.abs()
        assert ((got[row].double() - exact).abs() <= allowed).all(), (begin, end)
        if with_buffer:
            torch.testing.assert_close(got_d[row].double(), exact_d, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("guidance", "with_buffer"), [(0, False), (1, False), (2, False), (2, True)])
def test_kernel_flow_step(x_dtype, v_dtype, guidance, with_buffer):
    check_flow(x_dtype, v_dtype, guidance, with_buffer, RAGGED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_conversions_round_as_torch_does(dtype):
    """x_next = 0 + 1 * v is one rounding of v: every float16, every bfloat16 and every tie between two of them."""
    half = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    ties = (half.float() + half.roll(-1).float()) / 2
    bits = torch.arange(2**16, dtype=torch.int64) << 16
    brain, brain_ties = (b.to(torch.int32).view(torch.float32) for b in (bits, bits + 2**15))
    v = torch.cat([half.float(), ties, brain, brain_ties, torch.randn(999)])
    offsets = rows_of(len(v))
    got, _ = flow_step(torch.zeros(len(v), dtype=dtype), v, None, None, offsets, 0, dt=1.0)
    assert torch.equal(got.nan_to_num(7.0), (0 + v).to(dtype).nan_to_num(7.0))
    low = v.to(dtype)
    got, _ = flow_step(torch.zeros(len(v)), low, None, None, offsets, 0, dt=1.0)
    assert torch.equal(got.nan_to_num(7.0), low.float().nan_to_num(7.0))


@pytest.mark.parametrize("length", [1, 15, 64, 129])
def test_kernel_flow_equal_rows(length):
    check_flow(torch.float32, torch.float32, 2, True, rows_of(*[length] * 7), equal_rows=True)


@pytest.mark.parametrize("threshold", [0.0, 1e6])
def test_kernel_flow_threshold_off_or_never_reached(threshold):
    check_flow(torch.float32, torch.float32, 2, False, rows_of(300, 40), threshold=threshold)


def test_kernel_flow_zero_velocities():
    x, zero = torch.randn(1, 2, 20), torch.zeros(1, 2, 20)
    assert torch.equal(flow_step(x, zero, zero, None, None, 2)[0], x)


def test_kernel_flow_nan_stays_in_its_row():
    x, v_cond, v_uncond = torch.randn(3, 1, 3, 20)
    v_cond[0, 1, 5] = math.nan
    x_next = flow_step(x, v_cond, v_uncond, None, None, 2)[0].view(3, 20)
    assert x_next[1].isnan().all() and not x_next[[0, 2]].isnan().any()


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_kernel_flow_prefix(x_dtype, noisy):
    offsets, prefix_offsets = rows_of(40, 0, 33, 17), rows_of(40, 0, 3, 0)
    x, v = torch.randn(2, 90).to(x_dtype)
    prefix, noise = torch.randn(2, 43)
    got, _ = flow_step(x, v, None, None, offsets, 0, prefix, prefix_offsets, noise if noisy else None)
    want, _ = flow_step(x, v, None, None, offsets, 0)
    mixed = (0.75 * prefix + 0.25 * noise if noisy else prefix).to(x_dtype)
    want[:40], want[40:43] = mixed[:40], mixed[40:]
    assert torch.equal(got, want)


def test_kernel_flow_empty():
    for empty, offsets in ((torch.empty(0, 3, 4), None), (torch.empty(2, 3, 0), None), (torch.empty(0), rows_of(0, 0))):
        assert flow_step(empty, empty, empty, None, offsets, 2)[0].shape == empty.shape


X = torch.zeros(12)
DENSE = torch.zeros(1, 2, 6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(x=X.double()), "x must have dtype float32, bfloat16 or float16, got Double"),
        (dict(v_cond=X.double()), "v_cond must have dtype float32, bfloat16 or float16, got Double"),
        (dict(v_cond=X[:6]), "v_cond must have size 12 in dimension 0, got 6"),
        (dict(v_uncond=None), "v_uncond must be given where there is guidance alone, got guidance 2"),
        (dict(guidance=0), "v_uncond must be given where there is guidance alone, got guidance 0"),
        (dict(v_uncond=X.half()), "v_uncond must have dtype Float, got Half"),
        (dict(guidance=3), "guidance must be 0, 1 or 2, got 3"),
        (dict(guidance=1, buffer=X, momentum=0.0), "momentum_buffer must be absent unless guidance is 2"),
        (dict(momentum=0.5), "momentum_buffer must be given with a momentum, got none"),
        (dict(guidance=1, momentum=0.5), "momentum must be 0 unless guidance is 2, got 0.5"),
        (dict(buffer=X.half()), "momentum_buffer must have dtype Float, got Half"),
        (dict(buffer=X[:6]), "momentum_buffer must have size 12 in dimension 0, got 6"),
        (dict(offsets=None), r"x must have the shape \[B, C, ...\] without row_offsets, got 1 dimensions"),
        (dict(offsets=rows_of(5, 8)), "row_offsets must run from 0 to 12, got 0 to 13"),
        (dict(offsets=torch.tensor([0, 13, 12])), "row_offsets must not fall, got 13 before 12"),
        (dict(offsets=rows_of(12).int()), "row_offsets must have dtype Long, got Int"),
        (dict(offsets=rows_of(12)[:0]), r"row_offsets must have rows \+ 1 entries, got 0"),
        (dict(offsets=rows_of(12)[None]), "row_offsets must have 1 dimensions, got 2"),
        (dict(x=DENSE, v_cond=DENSE, v_uncond=DENSE), "x must have 1 dimensions, got 3"),
        (dict(prefix=X), "prefix_offsets must be given with row_offsets and prefix"),
        (dict(prefix=X.half()), "prefix must have dtype Float, got Half"),
        (dict(prefix=DENSE, prefix_offsets=rows_of(6, 6)), "prefix must have 1 dimensions, got 3"),
        (dict(prefix=X, prefix_offsets=rows_of(12)), "prefix_offsets must have 3 elements, got 2"),
        (dict(prefix=X[:7], prefix_offsets=rows_of(7, 0)), "prefix_offsets must give row 0 at most its 6 elements"),
        (dict(prefix=X, noise=X[:6]), "prefix_noise must have size 12 in dimension 0, got 6"),
        (dict(noise=X), "prefix must be given with prefix_offsets or prefix_noise, got none"),
        (dict(more_x=[X] * 3, a=[1.0] * 4), "more_x must hold at most 2 tensors, got 3"),
        (dict(more_x=[X]), "a must have 2 entries, got 1"),
        (dict(more_x=[X.half()], a=[1.0] * 2), "more_x must have dtype Float, got Half"),
        (dict(past=[X] * 4, past_b=[1.0] * 4), "past must hold at most 3 tensors, got 4"),
        (dict(past=[X]), "past_b must have 1 entries, got 0"),
        (dict(past=[X[:6]], past_b=[1.0]), "past must have size 12 in dimension 0, got 6"),
        (dict(a=[math.nan]), "a must be finite, got nan"),
        (dict(past=[X], past_b=[math.inf]), "past_b must be finite, got inf"),
        (dict(dt=math.nan), "b must be finite, got nan"),
        (dict(scale=math.inf), "scale must be finite, got inf"),
        (dict(threshold=-1.0), "threshold must be finite and at least 0, got -1"),
        (dict(eta=math.nan), "eta must be finite, got nan"),
        (dict(rescale=1.5), "rescale must lie between 0 and 1, got 1.5"),
        (dict(prefix_time=-0.5), "prefix_time must lie between 0 and 1, got -0.5"),
    ],
)
def test_flow_update_refuses(args, message):
    call = dict(x=X, v_cond=X, v_uncond=X, buffer=None, offsets=rows_of(6, 6), guidance=2)
    with pytest.raises(RuntimeError, match=message):
        flow_step(**{**call, **args})


@pytest.mark.parametrize("shape", [(1, 2, 7), (1, 3, 2), (2, 2, 2), (1, 2), (12,)], ids=str)
def test_flow_update_refuses_prefixes_of_other_shapes(shape):
    with pytest.raises(RuntimeError, match=r"prefix must be \[B, C, k, ...\] like x, got another shape"):
        flow_step(DENSE, DENSE, None, None, None, 0, torch.zeros(shape))


# --- ISA levels


def test_capability_is_one_that_was_built():
    assert _native.C.cpu_capability() in _native.C.build_info()["isa_levels"]


def with_capability(level, *command):
    # this very package, also where the current folder holds another copy of it
    environment = dict(os.environ, FLEXKERNELS_CPU_CAPABILITY=level, PYTHONPATH=str(Path(_native.__file__).parents[1]))
    folder = Path(__file__).parent
    return subprocess.run([sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_every_isa_level(level):
    """The kernel tests of this file once more, in a process that is held to `level`."""
    if _native.C is None or ISA_LEVELS.index(level) >= ISA_LEVELS.index(_native.C.cpu_capability()):
        pytest.skip(f"{level} is not below this process's own level")
    probe = f"from flexkernels import _native; assert _native.C.cpu_capability() == {level!r}"
    assert with_capability(level, "-c", probe).returncode == 0
    done = with_capability(level, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "test_kernel", __file__)
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_isa_level_is_a_reason_not_a_crash():
    program = "from flexkernels import _native; print(_native.cpu_unavailable)"
    done = with_capability("sse9", "-c", program)
    assert "FLEXKERNELS_CPU_CAPABILITY must be baseline, avx2, avx512 or avx512_bf16, got 'sse9'" in done.stdout, (
        done.stderr
    )
