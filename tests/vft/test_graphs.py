"""What a graph of the decoder's velocity is given, on a stand-in for CUDA graphs."""

from types import SimpleNamespace

import pytest
import torch

from vft import graphs
from vft.graphs import GRAPHS, VelocityGraphs
from vft.layers import Modulation


class Decoder:
    """A velocity that depends on all of its inputs, of weights that say they are on a GPU."""

    def __init__(self):
        weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, data_ptr=lambda: 1)
        self.head = SimpleNamespace(weight=weight)

    def velocity(self, latents, registers, modulation, packed):
        return [x + registers.sum() + modulation.blocks.sum() * modulation.head.sum() for x in latents]


@pytest.fixture
def captured(monkeypatch):
    """How many graphs were captured; a replay computes into what the capture gave."""
    found = []

    def capture(run):
        out = run()
        found.append(out)

        def replay():
            for mine, new in zip(out, run(), strict=True):
                mine.copy_(new)

        return SimpleNamespace(replay=replay), out

    monkeypatch.setattr(graphs, "capture", capture)
    return found


def inputs():
    modulation = Modulation(torch.randn(3), torch.randn(2))
    return [torch.randn(2, 3), torch.randn(1, 3)], torch.randn(4), modulation


def test_a_replay_is_the_call(captured):
    run, decoder, packed = VelocityGraphs(), Decoder(), object()
    latents, registers, modulation = inputs()
    for step in range(3):
        latents, _, modulation = inputs()
        # a second decode of the same shape
        registers = registers if step < 2 else torch.randn(4)
        got = [x.clone() for x in run(decoder, latents, registers, modulation, packed)]
        for x, want in zip(got, decoder.velocity(latents, registers, modulation, packed), strict=True):
            torch.testing.assert_close(x, want)
    assert len(captured) == 1


def test_registers_are_copied_once_a_decode(captured, monkeypatch):
    run, decoder, packed = VelocityGraphs(), Decoder(), object()
    latents, registers, modulation = inputs()
    run(decoder, latents, registers, modulation, packed)
    (graph,) = run._graphs.values()
    copies = []
    graph.registers = SimpleNamespace(copy_=copies.append)
    for given in (registers, registers, other := registers + 1, other, registers):
        # the stand-in computes nothing
        graph.graph = SimpleNamespace(replay=lambda: None)
        run(decoder, latents, given, modulation, packed)
    assert [c is want for c, want in zip(copies, (other, registers), strict=True)] == [True, True]


def test_the_latest_graphs_are_kept(captured):
    run, decoder = VelocityGraphs(), Decoder()
    arguments, shapes = inputs(), [object() for _ in range(GRAPHS + 1)]
    for packed in (*shapes, *shapes[1:]):
        run(decoder, *arguments, packed)
    assert len(captured) == GRAPHS + 1
    run(decoder, *arguments, shapes[0])
    assert len(captured) == GRAPHS + 2
