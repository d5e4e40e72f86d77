"""FSQ as PyTorch modules write it."""

import torch


class Formula:
    """The formula with its constants made once, as a module holds them.

    Source: arXiv 2309.15505, section 3.1 and the code of its appendix A.1.
    """

    def __init__(self, levels, device):
        count = torch.tensor(levels, dtype=torch.float32, device=device)
        self.levels = torch.tensor(levels, device=device)
        self.half = (count - 1) * (1 + 1e-3) / 2
        self.offset = torch.where(count % 2 == 0, 0.5, 0.0)
        self.shift = torch.atanh(self.offset / self.half)
        self.width = self.levels // 2
        self.basis = torch.cumprod(torch.tensor([1, *levels[:-1]], device=device), 0)

    def quantize(self, z):
        """z [..., D] -> codes [..., D] in z's dtype, ids [...]."""
        level = torch.round(torch.tanh(z.float() + self.shift) * self.half - self.offset)
        ids = ((level + self.width) * self.basis).sum(-1).to(torch.int64)
        return (level / self.width).to(z.dtype), ids

    def dequantize(self, ids):
        """ids [...] -> codes [..., D] float32."""
        level = ids.unsqueeze(-1) // self.basis % self.levels
        return (level - self.width) / self.width
