"""FSQ at the size of 64 clips, and of a data set that fills memory."""

import torch
from peers import fsq as fsq_peers

import flexkernels

from .case import Case, case, compiled, size

LEVELS = [8, 8, 8, 5, 5, 5]


def fsq_quantize(device: str, dtype: torch.dtype, rows=163_840) -> Case:
    z = (2 * torch.randn(rows, len(LEVELS))).to(dtype).to(device)
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


@case("fsq_quantize_large_fp32")
def fsq_quantize_large(device: str) -> Case:
    return fsq_quantize(device, torch.float32, 2**24)


@case("fsq_quantize_train_fp32")
def fsq_quantize_train(device: str) -> Case:
    z = 2 * torch.randn(64, 2560, len(LEVELS), device=device)
    options = {"seed": 1, "drop_p": 0.5, "corrupt_p": 0.2}
    codes, ids = flexkernels.fsq_quantize_train(z, LEVELS, **options)

    def check():
        # of the same device, whose tanh it follows
        expected = flexkernels.fsq_quantize_train_ref(z, LEVELS, **options)
        differing = sum(int((a != b).sum()) for a, b in zip((codes, ids), expected, strict=True))
        return f"{differing} codes and ids differ" if differing else None

    ours, formula = (
        lambda f=f: f(z, LEVELS, **options)
        for f in (flexkernels.fsq_quantize_train, flexkernels.fsq_quantize_train_ref)
    )
    return Case(
        torch.float32, list(z.shape), ours, {"eager formula": formula}, check, size(z, codes, ids),
        note="64 samples, half of them not rounded, a fifth of the tokens replaced",
    )  # fmt: skip


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
