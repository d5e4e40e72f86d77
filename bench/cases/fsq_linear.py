"""FSQ with its linear layers at the size of eight clips, width 1152."""

import torch
from peers import fsq as fsq_peers
from peers import fsq_linear as peers

import flexkernels

from .case import Case, accurate, case, size

LEVELS, ROWS, WIDTH = [8, 8, 8, 5, 5, 5], 20480, 1152


@case("fsq_project_quantize_fp32")
def fsq_project_quantize(device: str) -> Case:
    hidden, weight = torch.randn(ROWS, WIDTH, device=device), torch.randn(6, WIDTH, device=device) / 20
    bias, formula = torch.randn(6, device=device) / 10, fsq_peers.Formula(LEVELS, device)

    def ours():
        return flexkernels.fsq_project_quantize(hidden, weight, bias, LEVELS)

    def check():
        differing = int((ours() != flexkernels.fsq_project_quantize_ref(hidden, weight, bias, LEVELS)).sum())
        # a z within rounding of a threshold may fall either way
        return f"{differing} ids differ" if differing > 1e-3 * ROWS else None

    others = {
        "eager formula": lambda: peers.project_quantize(formula, hidden, weight, bias),
        "F.linear alone": lambda: torch.nn.functional.linear(hidden, weight, bias),
    }
    return Case(
        hidden.dtype, list(hidden.shape), ours, others, check, size(hidden, weight, ours()),
        2 * 6 * hidden.numel(), note="LN, linear to 6, int64 ids",
    )  # fmt: skip


@case("fsq_embed_fp32")
def fsq_embed(device: str) -> Case:
    ids = torch.randint(64000, (ROWS,), device=device)
    weight, bias, positions = (torch.randn(shape, device=device) for shape in ((WIDTH, 6), (WIDTH,), (256, WIDTH)))
    index, formula = torch.arange(ROWS, dtype=torch.int32, device=device) % 256, fsq_peers.Formula(LEVELS, device)
    tables = {"positions": positions, "position_index": index}
    codes = formula.dequantize(ids)

    def ours():
        return flexkernels.fsq_embed(ids, LEVELS, weight, bias, **tables)

    def check():
        wide = {"positions": positions.double(), "position_index": index}
        exact = flexkernels.fsq_embed_ref(ids, LEVELS, weight.double(), bias.double(), **wide)
        return accurate(ours(), flexkernels.fsq_embed_ref(ids, LEVELS, weight, bias, **tables), exact)

    return Case(
        weight.dtype, [ROWS, WIDTH], ours,
        {
            "eager formula": lambda: peers.embed(formula, ids, weight, bias, positions, index),
            "F.linear alone": lambda: torch.nn.functional.linear(codes, weight, bias),
        },
        check, size(ids, index, weight, bias, positions, ours()), note="linear from 6, 256 positions",
    )  # fmt: skip
