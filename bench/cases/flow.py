"""Solver steps at the size of eight clips."""

import torch
from peers import flow as flow_peers

import flexkernels
from flexkernels import APG, CFG, solvers

from .case import Case, accurate, case, compiled, size

DT, SCALE, THRESHOLD = -1 / 40, 25.0, 0.6


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


@case("flow_update_ab2_apg_fp32")
def flow_update_ab2(device: str) -> Case:
    x, v_cond, v_uncond = flow_tensors(device)
    past, step = torch.randn_like(x), solvers.adams_bashforth([1 + DT, 1 + 2 * DT, 1 + 3 * DT])
    numbers = {"b": step.b, "past_b": step.past_b, "guidance": APG(SCALE, THRESHOLD), "return_velocity": True}

    def update(function, *tensors):
        x, v_cond, v_uncond, past = tensors
        x_next, _, v = function([x], step.a, v_cond, v_uncond, past=[past], **numbers)
        return x_next, v

    def ours():
        return update(flexkernels.flow_update, x, v_cond, v_uncond, past)

    def check():
        given = x, v_cond, v_uncond, past
        exact = update(flexkernels.flow_update_ref, *(tensor.double() for tensor in given))
        found = zip(ours(), update(flexkernels.flow_update_ref, *given), exact, strict=True)
        return next((wrong for parts in found if (wrong := accurate(*parts))), None)

    settings = step.b, step.past_b[0], SCALE, THRESHOLD, 0.0
    peers = {"eager formula": lambda: flow_peers.apg_ab2_step(x, v_cond, v_uncond, past, *settings)}
    faster = compiled(flow_peers.apg_ab2_step, device)
    peers |= {name: lambda f=f: f(x, v_cond, v_uncond, past, *settings) for name, f in faster.items()}
    moved = size(x, v_cond, v_uncond, past, x, x)
    return Case(x.dtype, list(x.shape), ours, peers, check, moved, note="two-step Adams-Bashforth")
