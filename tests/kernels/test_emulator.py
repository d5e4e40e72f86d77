"""The emulator that the CUDA kernels' tests run in: right kernels give right results, each planted fault is found."""

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor

import emulator
import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulator.unavailable() is not None, reason=f"emulator: {emulator.unavailable()}"),
]
PLANTED = emulator.HERE / "planted.cu"


@pytest.fixture(scope="module")
def planted():
    return emulator.Library(emulator.build("planted", [PLANTED]))


def run(planted, name, *arguments):
    """What went wrong, or None."""
    function = getattr(planted, f"run_{name}")
    function.restype = ctypes.c_char_p
    error = function(*(ctypes.c_void_p(a) if a > 1 else ctypes.c_bool(a) for a in arguments))
    return error and error.decode()


def reverse(x):
    return x.view(3, 128).flip(1).flatten()


# kernel -> what it computes of x [384], how long its output is, and what is said of it with its fault
KERNELS = {
    "block_sums": (lambda x: x.view(3, 128).sum(1).repeat_interleave(128), "of_warp"),
    "one_more": (lambda x: 2 * x, "writes 4 bytes outside of every allocation: out + 1536, 0 behind the end"),
    "half_warps": (lambda x: x[:32].view(2, 16).sum(1).repeat_interleave(16), "which leaves out its own lane"),
    "reversed": (reverse, "race: "),
    "half_filled": (lambda x: x[:128], "which no thread of the block wrote"),
    "shifted": (lambda x: x[:128], "writes 4 bytes outside of every shared variable: shared tile + 512"),
    "half_waits": (lambda x: x[:128], "waits at __syncthreads()"),
    "copies": (lambda x: x, "is still filling: nothing waited for it"),
    "bulk_copies": (lambda x: x, "race: "),
    "cluster_ring": (lambda x: x.view(3, 128).roll(-1, 0).flatten(), "shared memory of a block that has returned"),
}
FLAGGED = {"spins": "deadlock", "publishes": "race: reads out"}


def tensors(planted, length):
    x, out = torch.randn(512), torch.full((length,), torch.nan)
    return x, planted.allocation(x, "x"), out, planted.allocation(out, "out", output=True)


def faulty_lines(kernel):
    """Of planted.cu: those of a kernel (or of the loop before them) that bear its fault."""
    lines = PLANTED.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.search(rf"__global__ void {kernel}\(", line))
    return [i + 1 for i, line in enumerate(lines) if i > start and "// fault" in line][:1]


def blamed(error, kernel):
    """Whether an error names the kernel and the line of its fault."""
    name, lines = (
        {"one_more": "doubled", "one_less": "doubled"}.get(kernel, kernel),
        re.findall(r"planted\.cu:(\d+)", error),
    )
    return name in error and faulty_lines(name)[0] in map(int, lines)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KERNELS)
def test_a_right_kernel_gives_its_result_in_any_order(planted, name, seed):
    planted.seed(seed)
    x, p, _, _ = tensors(planted, 1)
    x = x[: 512 if name == "copies" else 384]
    expected = KERNELS[name][0](x)
    out = torch.full(expected.shape, torch.nan)
    assert run(planted, name, True, p, planted.allocation(out, "out", output=True)) is None
    torch.testing.assert_close(out, expected)
    assert planted.unwritten(out) is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KERNELS)
def test_a_fault_is_found_with_its_kernel_and_line(planted, name, seed):
    planted.seed(seed)
    x, p, _, _ = tensors(planted, 1)
    out = torch.empty(KERNELS[name][0](x[:384]).shape if name != "copies" else 512)
    error = run(planted, name, False, p, planted.allocation(out, "out"))
    assert KERNELS[name][1] in error
    assert blamed(error, name), error


def test_a_tail_that_nothing_wrote_is_found_with_kernel_and_line(planted):
    _, p, out, q = tensors(planted, 384)
    assert run(planted, "one_less", False, p, q) is None
    error = planted.unwritten(out)
    assert "bytes 1532 to 1535 of out, which nothing wrote" in error
    assert blamed(error, "one_less"), error


@pytest.mark.parametrize("name", FLAGGED)
def test_blocks_that_wait_for_each_other(planted, name):
    x, p, out, q = tensors(planted, 256)
    flag = torch.zeros(1, dtype=torch.int32)
    r = planted.allocation(flag, "flag")
    assert run(planted, name, True, p, q, r) is None
    torch.testing.assert_close(out, torch.cat([x[:128], x[:128] + 1]))
    flag.zero_()
    error = run(planted, name, False, p, q, r)
    assert FLAGGED[name] in error
    assert blamed(error, name), error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direct", [True, False])
def test_matrix_fragments_have_the_documented_layout(planted, dtype, direct):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.full((16, 8), torch.nan)
    places = [planted.allocation(t, name) for t, name in ((a, "a"), (b, "b"), (c, "c"))]
    assert run(planted, "product", direct, dtype == torch.float16, *places) is None
    torch.testing.assert_close(c, (a.double() @ b.double()).float())


def test_movmatrix_transposes(planted):
    x = torch.randn(8, 8).half()
    out = torch.empty_like(x)
    assert run(planted, "transposed", planted.allocation(x, "x"), planted.allocation(out, "out")) is None
    assert torch.equal(out, x.t())


def test_votes_matches_reductions_and_shuffles(planted):
    x = torch.arange(32, dtype=torch.int32) * 7 % 31 + 1
    out = torch.full((16, 32), -1, dtype=torch.int32)
    assert run(planted, "warp_functions", planted.allocation(x, "x"), planted.allocation(out, "out")) is None
    v = x.tolist()
    lanes = range(32)

    def mask(chosen):
        word = sum(1 << lane for lane in lanes if chosen(lane))
        return word - (1 << 32) * (word >> 31)

    xor = 0
    for value in v:
        xor ^= value
    expected = [
        [mask(lambda i: v[i] % 2)] * 32,
        [1] * 32,
        [1] * 32,
        [mask(lambda i, lane=lane: v[i] % 3 == v[lane] % 3) for lane in lanes],
        [-1] * 32,
        [sum(v)] * 32,
        [-min(v)] * 32,
        [xor] * 32,
        [v[3]] * 32,
        [v[lane // 8 * 8 + 3] for lane in lanes],
        [v[lane - 2] if lane % 16 >= 2 else v[lane] for lane in lanes],
        [v[lane + 3] if lane % 8 < 5 else v[lane] for lane in lanes],
        [v[lane ^ 5] for lane in lanes],
        [sum(value % 2 for value in v)] * 32,
        [1] * 32,
        [1] * 32,
    ]
    assert out.tolist() == expected


def test_memory_that_libraries_ask_of_torch_is_freed():
    """By its address alone, as oneDNN's convolutions do. Another order aborts the process."""
    emulator.load_ops()
    image, kernel = torch.ones(6, 1, 64, 64), torch.ones(1, 1, 11, 1)
    assert (F.conv2d(image, kernel) == 11).all()


def test_every_ptx_function_is_emulated():
    """csrc/cuda/ptx.h and its emulation declare the same functions."""

    def functions(text, keyword):
        return set(re.findall(rf"^{keyword} [\w ]*?[ *&]*(\w+)\(", text, re.M)) - {"shared_address", "cluster_address"}

    real = functions((emulator.ROOT / "csrc/cuda/ptx.h").read_text(), "FLEXKERNELS_PTX")
    ours = functions((emulator.HERE / "include/emulated_ptx.h").read_text(), "EMU_INLINE")
    assert real == {name for name in ours if not name.startswith("emu_")}
    assert len(real) > 40


def test_of_several_who_want_an_object_one_makes_it(tmp_path):
    made, log = tmp_path / "made.o", tmp_path / "log"
    command = ["sh", "-c", f'echo once >> {log}; sleep 0.3; touch "$2"', "sh"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: emulator._make(made, command), range(4)))
    assert made.exists() and log.read_text() == "once\n"


def test_an_object_is_of_the_headers_that_its_source_reaches(tmp_path):
    source, near, far, other = (tmp_path / name for name in ("a.cu", "near.h", "far.h", "other.h"))
    source.write_text('#include "near.h"\n')
    near.write_text('#pragma once\n  #  include "far.h"\n')
    for header in (far, other):
        header.write_text("int one;\n")
    before = emulator._content(source)
    other.write_text("int two;\n")
    assert emulator._content(source) == before
    far.write_text("int two;\n")
    assert emulator._content(source) != before
