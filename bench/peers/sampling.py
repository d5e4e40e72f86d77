"""Sampling as eager code writes it: filters by a sort, the draw by torch.multinomial."""

import math

import torch


def sort_and_draw(logits, temperature, top_k, top_p):
    """logits [n, vocab] -> ids [n].

    Source: top-p of arXiv 1904.09751, section 3.1, after top-k of arXiv 1805.04833, section 5.4.
    """
    ordered, order = (logits.float() / temperature).sort(-1, descending=True)
    ordered[:, top_k:] = -math.inf
    p = ordered.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return order.gather(1, torch.multinomial(p, 1))[:, 0]


def topk_and_draw(logits, temperature, top_k, top_p):
    """The same by torch.topk, which is possible where top_k is given.

    Source: as above; torch.topk in place of the sort.
    """
    ordered, order = (logits.float() / temperature).topk(top_k)
    p = ordered.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return order.gather(1, torch.multinomial(p, 1))[:, 0]


def topk(logits, top_k):
    """The first filter and nothing else. Source: torch.topk, PyTorch documentation."""
    return logits.topk(top_k)


def draw(logits, temperature):
    """Source: torch.multinomial, PyTorch documentation."""
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]
