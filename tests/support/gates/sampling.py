import torch

from flexkernels.triton import sampling

from .record import Recorder

KERNELS = {"sample_logits_kernel"}


def launches():
    found = []
    sampling.sample_logits_kernel = Recorder(sampling.sample_logits_kernel, found)
    per_row = torch.zeros(2, dtype=torch.int64)
    for dtype, vocab, everything in (
        (torch.float32, 64000, False),
        (torch.bfloat16, 64000, True),
        (torch.half, 50, True),
    ):
        logits = torch.zeros(2, vocab, dtype=dtype)
        uncond, values, filters = (logits, per_row, (20, 0.5, 0.1)) if everything else (None, None, (vocab, 1.0, 0.0))
        for temperature in (0.0, 1.5):
            sampling.sample_logits_triton(
                logits, uncond, 1.5, temperature, *filters, 2**40, values, 2**40, values, everything
            )
    # every size and number 1, which Triton makes constants
    sampling.sample_logits_triton(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, 1.0, 1, 1.0, 0.0, 1, None, 1, None, True)
    return found
