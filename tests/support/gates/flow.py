import torch

from flexkernels import flow_math
from flexkernels.triton import flow

from .record import Recorder

KERNELS = {"flow_update_kernel"}


def launches():
    found = []
    flow.flow_update_kernel = Recorder(flow.flow_update_kernel, found)
    offsets = torch.zeros(3, dtype=torch.int64)
    for kind, rescale in (
        (flow_math.NO_GUIDANCE, 0.0),
        (flow_math.GUIDANCE_CFG, 0.0),
        (flow_math.GUIDANCE_CFG, 0.7),
        (flow_math.GUIDANCE_APG, 0.0),
    ):
        apg = kind == flow_math.GUIDANCE_APG
        plain, half = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
        for x, everything, scalars in ((plain, False, None), (half, True, None), (plain, True, torch.zeros(9))):
            wide, last = torch.zeros(64), torch.zeros(64) if apg and everything else None
            tensors = flow_math.Tensors(x, x, x if kind else None, last, None, None, None, None, scalars)
            a, past_b = [1.0], []
            if everything:
                tensors = tensors._replace(row_offsets=offsets, prefix=wide, prefix_offsets=offsets, prefix_noise=wide)
                tensors, a, past_b = tensors._replace(more_x=[x] * 2, past=[wide] * 3), [0.25] * 3, [0.5] * 3
            momentum = -0.5 if last is not None else 0.0
            numbers = flow_math.Numbers(a, -0.1, past_b, kind, 3.0, 0.6, 0.0, momentum, rescale, 0.5)
            flow.launch_update(tensors, 2, numbers, x, last, wide if everything else None)
    return found
