"""The cases of report.py under pytest-benchmark: `pytest bench`; ours and its peers form one group a case."""

import pytest
import torch
from cases import CASES, names_for

from vft.measure import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", params=names_for(DEVICE))
def case(request):
    made = CASES[request.param](DEVICE)
    with torch.no_grad():
        wrong = made.check()
    assert wrong is None, wrong
    yield made
    # compiled graphs of one case must not count towards another's limit of recompilations
    torch._dynamo.reset()


CONTENDERS = (
    "ours", "eager formula", "eager float32", "torch.compile", "F.linear alone", "torch linear", "plain loop",
    "dense-mask SDPA", "SDPA by blocks", "compiled FlexAttention", "SDPA on cache views", "two passes, not collapsed",
    "softmax and multinomial", "sort and multinomial", "topk and multinomial", "topk alone", "cuDNN, dense mask",
    "flash SDPA", "cuDNN SDPA", "FA3", "two calls",
)  # fmt: skip


def test_every_peer_is_a_contender(case):
    assert case.peers.keys() <= set(CONTENDERS)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.benchmark(max_time=0.25, min_rounds=3)
@torch.no_grad()
def test_speed(case, contender, benchmark):
    function = case.ours if contender == "ours" else case.peers.get(contender)
    if function is None:
        pytest.skip("the case has no such peer")
    function()

    def call():
        function()
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark(call)
