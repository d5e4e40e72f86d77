import torch

from flexkernels import flow_math
from flexkernels.triton import flow

from .record import Recorder

KERNELS = {"flow_step_kernel"}


def launches():
    found = []
    flow.flow_step_kernel = Recorder(flow.flow_step_kernel, found)
    offsets = torch.zeros(3, dtype=torch.int64)
    for kind in (flow_math.NO_GUIDANCE, flow_math.GUIDANCE_CFG, flow_math.GUIDANCE_APG):
        apg = kind == flow_math.GUIDANCE_APG
        for x, everything in ((torch.zeros(64), False), (torch.zeros(64, dtype=torch.bfloat16), True)):
            wide, last = torch.zeros(64), torch.zeros(64) if apg and everything else None
            tensors = flow_math.Tensors(x, x, x if kind else None, last, None, None, None, None)
            if everything:
                tensors = tensors._replace(row_offsets=offsets, prefix=wide, prefix_offsets=offsets, prefix_noise=wide)
            momentum = -0.5 if last is not None else 0.0
            numbers = flow_math.Numbers(-0.1, kind, 3.0, 0.6, 0.0, momentum, 0.5)
            flow.flow_step_triton(tensors, 2, numbers, x, last)
    return found
