"""The persistent kernel of a whole step, in the emulator: its results, its schedules, what it refuses."""

import ctypes
import re
from functools import partial

import emulator
import pytest
import torch
from golden_generator import CASES as GOLDEN
from golden_generator import conditions, io
from helpers import assert_accurate
from paths import GENERATORS
from step_cases import Case, by_parts

import flexkernels
import vft
from flexkernels import transformer_step_, transformer_step_ref_, transformer_step_refusal

pytestmark = [pytest.mark.emulator]
persistent_ = partial(transformer_step_, persistent=True)


@pytest.fixture(autouse=True)
def schedule():
    """The order of the emulator's blocks is reset after each test."""
    loaded = emulator.load_ops()
    yield loaded
    loaded.seed(0)
    loaded.late(0)


def small(**options):
    case = Case(**dict(rows=1, heads=2, head_dim=64, hidden=64, layers=1, dtype=torch.bfloat16) | options)
    # short caches are quick in the emulator
    case.cache_len.clamp_(max=70)
    return case


def run(case, step=persistent_):
    with flexkernels.backend("cuda"):
        return case.run(step)


def check(case):
    """x and the caches of a step: as accurate as the formula, and of the caches one position a row."""
    got, formula = run(case), case.run(transformer_step_ref_)
    if case.weights.int8:
        eps = torch.finfo(case.x.dtype).eps
        assert (got[0].double() - formula[0].double()).norm() < 2 * eps * formula[0].double().norm()
    else:
        assert_accurate(got[0], formula[0], case.run(transformer_step_ref_, torch.Tensor.double)[0])
    rows, dtype = len(case.x), case.x.dtype
    for mine, reference, before in zip(got[1:], formula[1:], case.caches, strict=True):
        torch.testing.assert_close(mine, reference, atol=16 * torch.finfo(dtype).eps, rtol=0)
        written = (mine != before).any(-1).any(2).any(0)
        want = torch.arange(mine.shape[3]) == torch.cat([case.cache_len, torch.tensor([0])])[:, None] - 1
        assert torch.equal(written, want)
    assert written.sum() == rows
    return got


CASES = {
    "narrow": dict(heads=2, hidden=64),
    "guided": dict(rows=2, heads=3, hidden=192, layers=2),
    "long heads": dict(rows=3, heads=2, head_dim=128, hidden=128),
    "eight rows": dict(rows=8, heads=2, hidden=128),
    "int8": dict(rows=2, heads=2, hidden=128, int8=True),
    "half": dict(rows=5, heads=1, head_dim=128, dtype=torch.float16),
    "half int8": dict(rows=1, heads=2, dtype=torch.float16, int8=True),
    "contexts": dict(rows=4, heads=2, contexts=2),
    # the kernel of widths above 1,024 or hidden widths above 3,072
    "wide": dict(heads=17, hidden=64),
    "deep": dict(rows=3, heads=1, hidden=4160),
    "deep int8": dict(rows=2, heads=1, hidden=3136, int8=True, contexts=1),
}


@pytest.mark.parametrize("name", CASES)
def test_results(name):
    case = small(**CASES[name])
    if name == "contexts":
        case.cross["cross_len"] = torch.tensor([0, 9], dtype=torch.int32)
    check(case)


@pytest.mark.parametrize("lengths", [[1, 2], [65, 64], [128, 129], [300, 257]], ids=str)
def test_lengths_of_the_cache(lengths):
    case = small(rows=2)
    case.cache_len = torch.tensor(lengths, dtype=torch.int32)
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(rows=2, heads=16, hidden=2752),  # a published generator's layer
        dict(rows=7, heads=8, head_dim=128, hidden=64, int8=True),
        dict(rows=2, heads=2, hidden=1088, contexts=1),
        dict(rows=5, heads=9, head_dim=128, hidden=128, contexts=1),
        dict(rows=2, heads=18, hidden=64, int8=True, dtype=torch.float16),
        dict(rows=1, heads=32, hidden=6144, dtype=torch.float16),  # the most it takes
        dict(rows=1, layers=25),  # two launches
    ],
    ids=str,
)
def test_large_results(options):
    check(small(**options))


def test_a_cache_of_other_strides():
    case = small(rows=2)
    case.cache_len.clamp_(max=20)
    # [layers, rows, positions, heads, head_dim] in memory, as a fused projection leaves it
    before = run(case)
    case.caches = case.caches.transpose(3, 4).contiguous().transpose(3, 4)
    for a, b in zip(run(case), before, strict=True):
        assert torch.equal(a, b)


def test_rows_do_not_depend_on_each_other():
    case = small(rows=3)
    x, _, _ = run(case)
    alone = case.x[1:2].clone()
    k, v = case.caches.clone()[:, :, 1:2]
    with flexkernels.backend("cuda"):
        persistent_(alone, case.weights, k, v, case.cache_len[1:2])
    assert torch.equal(alone[0], x[1])


@pytest.mark.parametrize("late", [1, 2, 3])
def test_any_schedule_gives_the_same_bits(schedule, late):
    case = small(rows=2)
    want = run(case)
    schedule.seed(late)
    schedule.late(late)
    for a, b in zip(run(case), want, strict=True):
        assert torch.equal(a, b)


def test_steps_one_after_the_other():
    """Two tokens, the second seeing the key of the first, as the step in parts within rounding."""
    case = small(rows=2)
    ours, parts = ((case.x.clone(), case.caches.clone(), case.cache_len.clamp(max=20)) for _ in range(2))
    for step, (x, caches, length) in ((persistent_, ours), (transformer_step_ref_, parts)):
        for _ in range(2):
            with flexkernels.backend("cuda"):
                step(x, case.weights, caches[0, :, :2], caches[1, :, :2], length)
            length += 1
    torch.testing.assert_close(ours[0], parts[0], atol=0.1, rtol=0.05)
    torch.testing.assert_close(ours[1], parts[1], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("kind", [GOLDEN[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in GOLDEN[1:])])
@torch.no_grad()
def test_greedy_ids_of_the_published_generators(kind, monkeypatch):
    calls = []

    def in_one_kernel(*args, **options):
        calls.append(len(args[0]))
        with flexkernels.backend("cuda"):
            persistent_(*args, **options)

    monkeypatch.setattr(vft.generator, "transformer_step_", in_one_kernel)
    model = vft.Generator.from_pretrained(GENERATORS / kind, dtype=torch.bfloat16)
    ids = model.generate(**conditions(kind, slice(1)), frames=1, tokens_per_frame=2, temperature=0, guidance=2.5)
    assert calls == [2]  # the first token is of the prefix
    assert torch.equal(vft.time_first(ids), io(kind)["greedy_ids_cfg2.5"][:1, :2])


# who serves a call


def test_one_kernel_by_default_and_parts_where_asked(monkeypatch):
    case = small(rows=2)
    parts, one = run(case, by_parts), run(case)
    assert not torch.equal(parts[0], one[0])
    monkeypatch.delenv("FLEXKERNELS_PERSISTENT_STEP", raising=False)
    assert torch.equal(run(case, transformer_step_)[0], one[0])
    assert torch.equal(run(case, partial(transformer_step_, persistent=False))[0], parts[0])
    monkeypatch.setenv("FLEXKERNELS_PERSISTENT_STEP", "0")
    assert torch.equal(run(case, transformer_step_)[0], parts[0])


@pytest.mark.parametrize(
    ("options", "timed"),
    [
        (dict(heads=16, hidden=3072), True),
        (dict(dtype=torch.float16), True),
        (dict(heads=17), False),
        (dict(hidden=3136), False),
        (dict(int8=True), False),
        (dict(dtype=torch.float32), False),
    ],
    ids=str,
)
def test_one_kernel_is_preferred_where_it_has_been_timed(options, timed, monkeypatch):
    weights = small(**options).weights
    monkeypatch.delenv("FLEXKERNELS_PERSISTENT_STEP", raising=False)
    assert flexkernels.prefers_persistent_step(weights) is timed
    for asked in ("0", "1"):
        monkeypatch.setenv("FLEXKERNELS_PERSISTENT_STEP", asked)
        assert flexkernels.prefers_persistent_step(weights) is (asked == "1")


REFUSED = {
    "it takes bfloat16 and float16": dict(dtype=torch.float32),
    "it takes at most 8 rows": dict(rows=9),
    "it takes widths up to 2048 that are multiples of 64": dict(heads=33),
    "it takes hidden widths up to 6144 that are multiples of 64": dict(hidden=72),
    "it takes a head_dim of 64 or 128": dict(heads=4, head_dim=32),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_take_has_a_reason(reason):
    case = small(**REFUSED[reason])
    with flexkernels.backend("cuda"):
        caches = case.caches[:, :, : len(case.x)]
        assert transformer_step_refusal(case.x, case.weights, *caches, case.cache_len) == reason
    with pytest.raises(RuntimeError, match=f"persistent must not be True here: {reason}"):
        run(case)


def test_what_it_does_not_take_goes_in_parts(monkeypatch):
    case = small(heads=2, head_dim=32)
    case.cache_len.clamp_(max=20)
    monkeypatch.setenv("FLEXKERNELS_PERSISTENT_STEP", "1")
    assert torch.equal(run(case, transformer_step_)[0], run(case, by_parts)[0])


def test_it_is_taken_or_the_memory_does_not_fit():
    case = small(rows=1)
    with flexkernels.backend("cuda"):
        k, v = case.caches[:, :, :1]
        assert transformer_step_refusal(case.x, case.weights, k, v, case.cache_len) is None
        odd = torch.zeros(k.numel() + 1).bfloat16()[1:].view(k.shape)
        assert "must begin on 16 bytes" in transformer_step_refusal(case.x, case.weights, odd, v, case.cache_len)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_other_backends_have_no_such_kernel(name):
    with flexkernels.backend(name), pytest.raises(RuntimeError, match="kernel"):
        small().run(persistent_)


# faults planted in the kernel's own source

# name -> file, what stands there, what then does, what the emulator says (None: a wrong result will do)
UNROLL = "#pragma unroll\n      for (int b = 0;"
FAULTS = {
    "a reader does not look at the number": ("step_words.h", "if (!(other & 0xffffu)) return;", "return;", None),
    "a wrong number": ("step_attention.h", "half | (phase + 1)", "half | phase", "deadlock|has looked"),
    "a tile is used before it is there": (
        "step_linear.h",
        "ptx::mbarrier_wait(s.full + at.slot, at.parity);",
        ";",
        "is still filling|which no thread",
    ),
    "a tile is given back too early": (
        "step_linear.h",
        "    __syncwarp();\n    if (lane < tiles)",
        "    if (lane < tiles)",
        "race",
    ),
    "sums are overwritten": ("step_consumer.h", "l.sync();\n" + UNROLL, UNROLL, "race"),
}


# the kernel alone, for one kind of step, with what the test hands over in the order of `pointers`
HARNESS = """
#include "csrc/cuda/transformer.cu"
namespace flexkernels::cuda {
extern "C" const char* run_step(void** t, int rows, int width, int hidden, int heads, int max_len) {
  static std::string message;
  TransformerStep p{};
  p.x = t[0], p.words = static_cast<uint32_t*>(t[1]), p.k = t[2], p.v = t[3];
  p.keys.length = static_cast<int32_t*>(t[4]), p.keys.max_len = max_len;
  const int d = width / heads;
  for (int64_t* s : {p.keys.k_stride, p.keys.v_stride}) s[0] = heads * max_len * d, s[1] = max_len * d, s[2] = d;
  p.layers = 1, p.rows = rows, p.width = width, p.hidden = hidden, p.heads = heads, p.head_dim = d;
  p.eps = 1e-6f, p.dtype = Dtype::bf16;
  StepLayer& l = p.layer[0];
  l.norm_attn = t[5], l.norm_mlp = t[6];
  l.qkv.weight = t[7], l.proj.weight = t[8], l.w13.weight = t[9], l.w2.weight = t[10];
  try {
    transformer_step_launch(p, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
}
"""


def copy_kernel(folder, changed=None, right="", wrong=""):
    """The emulator's object of the kernel from a copy of the sources, one of which is changed."""
    for source in (emulator.ROOT / "csrc").rglob("*.[hc]*"):
        copy = folder / source.relative_to(emulator.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        if source.name == "transformer.cu":
            # one instance is enough
            text = re.sub(
                r"(Kernel kernel_of\(.*?\) )\{.*?\n\}\n",
                r"\1{ return transformer_step_kernel<bf16, false, 1>; }\n",
                text,
                flags=re.S,
            )
            text = text.replace("kernel_of(const TransformerStep& p)", "kernel_of(const TransformerStep&)")
        if source.name == changed:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        copy.write_text(text)
    (folder / "step.cu").write_text(HARNESS)
    return emulator.Library(emulator.build("step", [folder / "step.cu"]))


def run_copy(kernel, case, seed):
    """x after a step and what went wrong; some blocks are late."""
    kernel.run_step.restype = ctypes.c_char_p
    rows, width = case.x.shape
    hidden = case.weights.weights[-1].shape[1]
    x, caches = case.x.clone(), case.caches[:, 0, :rows].contiguous()
    words = torch.zeros(1 << 16, dtype=torch.int32)
    tensors = [x, words, *caches, case.cache_len, *case.weights.norms, *case.weights.weights]
    places = [kernel.allocation(t, f"tensor {i}") for i, t in enumerate(tensors)]
    kernel.seed(seed)
    kernel.late(2)
    shape = (rows, width, hidden, caches.shape[2], caches.shape[3])
    error = kernel.run_step((ctypes.c_void_p * len(places))(*places), *shape)
    return x, error and error.decode()


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path):
    case = small(rows=2, hidden=128)
    right = copy_kernel(tmp_path / "right")
    want, error = run_copy(right, case, 0)
    assert error is None
    for number, (fault, (file, before, after, message)) in enumerate(FAULTS.items()):
        kernel = copy_kernel(tmp_path / str(number), file, before, after)
        outcomes = [run_copy(kernel, case, seed) for seed in range(3)]
        if message is None:
            assert any(error or not torch.equal(x, want) for x, error in outcomes), fault
        else:
            assert any(error and re.search(message, error) for _, error in outcomes), (fault, outcomes)
