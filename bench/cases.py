"""What is measured. A case is one function under `@case(name)` that makes a `Case` for a device."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peers import attention as attention_peers
from peers import flow as flow_peers
from peers import fsq as fsq_peers

import flexkernels
from flexkernels import APG, CFG

LEVELS = [8, 8, 8, 5, 5, 5]
DT, SCALE, THRESHOLD = -1 / 40, 25.0, 0.6


@dataclass
class Case:
    """One op at one size.

    ours and peers take nothing and compute the same thing. check says why our result is wrong, or None; nothing is
    timed against a wrong result. bytes and flops are the least that any implementation must move and compute.
    """

    dtype: torch.dtype
    shape: list[int]
    ours: Callable
    peers: dict[str, Callable]
    check: Callable[[], str | None]
    bytes: int
    flops: int = 0
    note: str = ""
    name: str = field(default="", init=False)


CASES: dict[str, Callable[[str], Case]] = {}


def case(name: str):
    def add(make):
        def named(device: str) -> Case:
            torch.manual_seed(0)
            result = make(device)
            result.name = name
            return result

        CASES[name] = named
        return named

    return add


def size(*tensors: torch.Tensor) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiled(function, device: str) -> dict[str, Callable]:
    """The peer `torch.compile`, where its compiler can run."""
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return {}
    return {"torch.compile": torch.compile(function, fullgraph=True)}


def accurate(result, plain, exact) -> str | None:
    """Why `result` is further from `exact` (float64) than twice the eager formula `plain` is, or None."""
    error, allowed = ((value.double() - exact).abs().max() for value in (result, plain))
    rounding = torch.finfo(result.dtype).eps / 2 * exact.abs().max()
    budget = 2 * torch.maximum(allowed, rounding)
    return None if bool(error <= budget) else f"error {error:.2e} over {budget:.2e}"


def fsq_quantize(device: str, dtype: torch.dtype) -> Case:
    z = (2 * torch.randn(163840, len(LEVELS))).to(dtype).to(device)
    formula = fsq_peers.Formula(LEVELS, device)
    codes, ids = flexkernels.fsq_quantize(z, LEVELS)

    def check():
        # the specification is the formula as the CPU evaluates it
        expected_codes, expected_ids = flexkernels.fsq_quantize_ref(z.cpu(), LEVELS)
        differing = int((codes.cpu() != expected_codes).sum()) + int((ids.cpu() != expected_ids).sum())
        return f"{differing} codes and ids differ" if differing else None

    peers = {"eager formula": lambda: formula.quantize(z)}
    peers |= {name: lambda f=f: f(z) for name, f in compiled(formula.quantize, device).items()}
    return Case(
        dtype, list(z.shape), lambda: flexkernels.fsq_quantize(z, LEVELS), peers, check, size(z, codes, ids),
        note="codes and int64 ids, levels 8,8,8,5,5,5",
    )  # fmt: skip


@case("fsq_quantize_fp32")
def fsq_quantize_fp32(device: str) -> Case:
    return fsq_quantize(device, torch.float32)


@case("fsq_quantize_bf16")
def fsq_quantize_bf16(device: str) -> Case:
    return fsq_quantize(device, torch.bfloat16)


@case("fsq_dequantize_fp32")
def fsq_dequantize(device: str) -> Case:
    ids = torch.randint(64000, (163840,), device=device)
    formula = fsq_peers.Formula(LEVELS, device)
    codes = flexkernels.fsq_dequantize(ids, LEVELS)

    def check():
        return None if torch.equal(codes, flexkernels.fsq_dequantize_ref(ids, LEVELS)) else "codes differ"

    peers = {"eager formula": lambda: formula.dequantize(ids)}
    peers |= {name: lambda f=f: f(ids) for name, f in compiled(formula.dequantize, device).items()}
    return Case(
        torch.float32, list(codes.shape), lambda: flexkernels.fsq_dequantize(ids, LEVELS), peers, check,
        size(ids, codes), note="int64 ids, levels 8,8,8,5,5,5",
    )  # fmt: skip


def flow_tensors(device: str):
    """x, v_cond, v_uncond of eight 17-frame clips at 256 x 256."""
    x, v_cond, difference = (torch.randn(8, 16, 5, 32, 32, device=device) for _ in range(3))
    return x, v_cond, v_cond + 0.1 * difference


def flow_case(tensors, guidance, peers, note: str) -> Case:
    def ours():
        return flexkernels.flow_step(*tensors, dt=DT, guidance=guidance)[0]

    def check():
        exact = flexkernels.flow_step_ref(*(tensor.double() for tensor in tensors), dt=DT, guidance=guidance)[0]
        return accurate(ours(), flexkernels.flow_step_ref(*tensors, dt=DT, guidance=guidance)[0], exact)

    x = tensors[0]
    return Case(x.dtype, list(x.shape), ours, peers, check, size(*tensors, x), note=note)


@case("flow_step_apg_fp32")
def flow_step_apg(device: str) -> Case:
    tensors = flow_tensors(device)
    settings = (DT, SCALE, THRESHOLD, 0.0)
    peers = {
        "eager formula": lambda: flow_peers.apg_step(*tensors, *settings),
        "eager float32": lambda: flow_peers.apg_step(*tensors, *settings, projection=torch.float32),
    }
    peers |= {name: lambda f=f: f(*tensors, *settings) for name, f in compiled(flow_peers.apg_step, device).items()}
    return flow_case(tensors, APG(SCALE, THRESHOLD), peers, "eager formula projects in float64, as published")


@case("flow_step_cfg_fp32")
def flow_step_cfg(device: str) -> Case:
    tensors = flow_tensors(device)
    peers = {"eager formula": lambda: flow_peers.cfg_step(*tensors, DT, SCALE)}
    peers |= {name: lambda f=f: f(*tensors, DT, SCALE) for name, f in compiled(flow_peers.cfg_step, device).items()}
    return flow_case(tensors, CFG(SCALE), peers, "")


def attention_encoder(device: str, dtype: torch.dtype) -> Case:
    heads, head_dim = 8, 64
    layout = flexkernels.SequenceLayout([[(256, 256)] * 5], "frame_causal_prefix", device=device)
    q, k, v = torch.randn(3, layout.total, heads, head_dim).to(dtype).to(device)
    mask = layout.visible()

    def ours():
        return flexkernels.attention(q, k, v, layout)

    def check():
        exact = flexkernels.attention_ref(q.double(), k.double(), v.double(), layout)
        return accurate(ours(), flexkernels.attention_ref(q, k, v, layout), exact)

    peers = {"dense-mask SDPA": lambda: attention_peers.dense_mask(q, k, v, mask)}
    flops = 4 * head_dim * heads * int(mask.sum())
    note = "5 frames of 256 patches and 256 registers; flops count seen pairs"
    return Case(dtype, list(q.shape), ours, peers, check, size(q, k, v, q), flops, note)


@case("attention_encoder_fp32")
def attention_encoder_fp32(device: str) -> Case:
    return attention_encoder(device, torch.float32)


@case("attention_encoder_bf16")
def attention_encoder_bf16(device: str) -> Case:
    return attention_encoder(device, torch.bfloat16)
