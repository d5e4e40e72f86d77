import torch

from flexkernels import SequenceLayout
from flexkernels.triton import attention, attention_backward

from .record import Recorder

KERNELS = {"attention_kernel", "attention_dq_kernel", "attention_dkdv_kernel"}
FULL, PREFIX, SWITCHED = (0, (1, 1, 1, 1)), (3, (1, 1, 1, 1)), (3, (1, 0, 0, 2))
# dtype, head_dim, mask and cross, rows of a tile, weights (True: of any key, "few": of listed ones), query heads a kv
# head
FORWARD = (
    (torch.bfloat16, 64, PREFIX, 64, True, 1),
    (torch.bfloat16, 64, PREFIX, 64, "few", 1),
    (torch.bfloat16, 128, PREFIX, 64, "few", 1),
    (torch.bfloat16, 64, FULL, 128, False, 1),
    (torch.bfloat16, 64, SWITCHED, 64, True, 1),
    (torch.float16, 128, FULL, 128, False, 4),
    (torch.bfloat16, 128, PREFIX, 64, True, 1),
    (torch.bfloat16, 256, SWITCHED, 64, False, 1),
    (torch.float32, 64, PREFIX, 64, True, 1),
    (torch.float32, 17, FULL, 64, False, 1),
    (torch.float32, 128, SWITCHED, 64, True, 1),
)
BACKWARD = (
    (torch.bfloat16, 64, PREFIX, 64, True, 1),
    (torch.bfloat16, 64, SWITCHED, 64, True, 1),
    (torch.float16, 128, FULL, 128, False, 4),
    (torch.float16, 256, PREFIX, 64, False, 4),
    (torch.float32, 64, SWITCHED, 64, False, 1),
    (torch.float32, 17, PREFIX, 64, True, 1),
    (torch.float32, 128, SWITCHED, 64, True, 1),
)


def launch(dtype, head_dim, mask, rows, weighted, group, backward, apart=False):
    q, k = torch.zeros(32, 4, head_dim, dtype=dtype), torch.zeros(32, 4 // group, head_dim, dtype=dtype)
    if apart:
        k = k.transpose(0, 1).contiguous().transpose(0, 1)
    lse, weight = torch.zeros(4, 32), torch.zeros(32) if weighted else None
    made = SequenceLayout([[(32, 0)]], "full", weighted_keys=[3] if weighted == "few" else None).tensors
    layout = list(made._replace(rows=torch.zeros(1, rows, dtype=torch.int32)))
    given = layout, weight, *mask, 0.125
    if backward:
        attention_backward.launch(q, q, k, k, q, lse, *given, q, k, k)
    else:
        attention.launch(q, k, k, *given, q, lse)


def launches():
    found = []
    for module in (attention, attention_backward):
        for name in KERNELS & set(vars(module)):
            setattr(module, name, Recorder(getattr(module, name), found))
    for case in FORWARD:
        launch(*case, backward=False)
    for case in BACKWARD:
        launch(*case, backward=True)
    # heads that do not lie side by side are read through pointers
    launch(torch.float16, 128, FULL, 128, False, 2, backward=False, apart=True)
    # every count that can be 1 is 1
    launch(torch.bfloat16, 1, PREFIX, 64, False, 4, backward=False)
    launch(torch.bfloat16, 1, PREFIX, 64, False, 4, backward=True)
    return found
