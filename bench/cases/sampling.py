"""One token for two sequences from a vocabulary of 64,000, and for 64 from one of 131,072."""

import torch
from peers import sampling as sampling_peers

import flexkernels

from .case import Case, case, size


def sample_case(device: str, peers, note: str, shape=(2, 64_000), **settings) -> Case:
    logits = (2.5 * torch.randn(shape)).to(device)

    def ours():
        return flexkernels.sample_logits(logits, seed=1, **settings)

    def check():
        expected = flexkernels.sample_logits_ref(logits.cpu(), seed=1, **settings)
        return None if torch.equal(ours().cpu(), expected) else "ids differ from the reference"

    peers = {name: lambda f=f: f(logits) for name, f in peers.items()}
    return Case(logits.dtype, list(logits.shape), ours, peers, check, size(logits), note=note, bandwidth="read")


def filtered(device: str, shape) -> Case:
    numbers = 0.9, 100, 0.9
    peers = {
        "sort and multinomial": lambda x: sampling_peers.sort_and_draw(x, *numbers),
        "topk and multinomial": lambda x: sampling_peers.topk_and_draw(x, *numbers),
        "topk alone": lambda x: sampling_peers.topk(x, numbers[1]),
    }
    note = "temperature 0.9, top-k 100, top-p 0.9"
    return sample_case(device, peers, note, shape, temperature=0.9, top_k=100, top_p=0.9)


@case("sample_logits_filtered_fp32")
def sample_filtered(device: str) -> Case:
    return filtered(device, (2, 64_000))


@case("sample_logits_batch64_fp32")
def sample_batch64(device: str) -> Case:
    return filtered(device, (64, 131_072))


@case("sample_logits_top_p_fp32")
def sample_top_p(device: str) -> Case:
    peers = {"sort and multinomial": lambda x: sampling_peers.sort_and_draw(x, 0.9, x.shape[1], 0.9)}
    return sample_case(device, peers, "temperature 0.9, top-p 0.9", temperature=0.9, top_p=0.9)


@case("sample_logits_plain_fp32")
def sample_plain(device: str) -> Case:
    peers = {"softmax and multinomial": lambda x: sampling_peers.draw(x, 0.9)}
    return sample_case(device, peers, "temperature 0.9, no filter", temperature=0.9)
