"""The sampling loop around the decoder: modulation tables, guidance intervals, solvers, bfloat16, compilation."""

import copy

import pytest
import torch
from golden_tokenizer import load, samples

import flexkernels
import vft
from vft import layers
from vft.modulation import ModulationTable
from vft.packing import Member
from vft.solver import SOLVERS, interval

T = 0.6


def test_modulation_table_in_pieces():
    model, _, _ = load("base")
    times = [1 - i / 7 for i in range(7)]
    whole, pieces = ModulationTable(model.decoder, times), ModulationTable(model.decoder, times, limit=1)
    assert (whole.held, pieces.held) == (7, 1) and whole.bytes == 7 * pieces.bytes
    for i in range(7):
        for a, b in zip(whole[i], pieces[i], strict=True):
            torch.testing.assert_close(a, b)
    one = model.decoder.modulation(torch.tensor(times[3:4]))
    assert one.blocks.numel() * 4 + one.head.numel() * 4 == pieces.bytes
    torch.testing.assert_close(whole[3].blocks, one.blocks)


def test_passes_outside_the_guidance_interval_have_no_unconditional_sequences(monkeypatch):
    model, io, _ = load("base")
    sizes = []
    inner = layers.Decoder.velocity
    monkeypatch.setattr(layers.Decoder, "velocity", lambda *a: sizes.append(len(a[-1].grids)) or inner(*a))
    ids, noise = [io["tokens_0"][0]], [io["noise_0"][0]]
    model.decode_latents(ids, 4, 4, vft.CFG(interval(3.0, 0.4, 0.8)), noise=noise)
    assert sizes == [1, 2, 2, 1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_approach_the_same_solution(solver):
    model, io, _ = load("base")
    ids, noise = [io["tokens_0"][0]], [io["noise_0"][0]]
    run = lambda solver, steps: model.decode_latents(ids, 4, steps, None, solver, noise=noise)[0]  # noqa: E731
    exact = run("rk4", 40)
    errors = [float((run(solver, steps) - exact).norm() / exact.norm()) for steps in (5, 20)]
    assert errors[1] < 0.5 * errors[0] or errors[0] < 1e-5
    assert errors[1] < 0.02


def test_bfloat16_with_a_float32_state():
    """The solver's state stays float32 and the result near the float32 model's."""
    model, io, _ = load("base")
    half = copy.deepcopy(model).to(torch.bfloat16)
    ids, noise = samples(io, "tokens"), samples(io, "noise")
    want = model.decode_latents(ids, [4, 11], 5, vft.CFG(2.0), noise=noise)
    got = half.decode_latents(ids, [4, 11], 5, vft.CFG(2.0), noise=noise)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert float((g - w).norm()) <= 0.03 * float(w.norm())


def test_bfloat16_velocities_are_not_copied_to_float32(monkeypatch):
    """The update reads them as they are, and its results are those of copies."""
    model, io, _ = load("base")
    model, noise = copy.deepcopy(model).to(torch.bfloat16), samples(io, "noise")
    run = lambda: model.decode_latents(samples(io, "tokens"), [4, 11], 3, vft.APG(4.0), noise=noise)  # noqa: E731
    update, given = flexkernels.flow_update, []
    monkeypatch.setattr(
        flexkernels, "flow_update", lambda x, a, *v, **o: given.extend((*x, *v)) or update(x, a, *v, **o)
    )
    got = run()
    assert [t.dtype for t in given[:3]] == [torch.float32, torch.bfloat16, torch.bfloat16]
    inner = layers.Decoder.velocity
    copied = lambda self, x, *rest: [v.float() for v in inner(self, [z.bfloat16() for z in x], *rest)]  # noqa: E731
    monkeypatch.setattr(layers.Decoder, "velocity", copied)
    assert all(torch.equal(g, w) for g, w in zip(got, run(), strict=True))


def test_one_velocity_call_compiles_as_one_graph():
    model, io, _ = load("base")
    decoder = model.prepare().decoder
    x = samples(io, "noised")
    packed = decoder.packing(x, (Member(0, 4), Member(1, 11), Member(0, 4, null=True)), True)
    registers = decoder.embed_registers(torch.randn(sum(i.numel() for i in samples(io, "tokens")), 6), packed)
    modulation = decoder.modulation(torch.tensor([T]))
    compiled = torch.compile(decoder.velocity, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(x, registers, modulation, packed), decoder.velocity(x, registers, modulation, packed), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graphs_change_nothing():
    model, io, _ = load("base")
    model = copy.deepcopy(model).cuda()
    ids, noise = samples(io, "tokens"), [x.cuda() for x in samples(io, "noise")]
    run = lambda keep: model.decode_latents(ids, keep, 5, vft.APG(), "heun", noise=noise)  # noqa: E731
    graphed = [run(keep) for keep in ([4, 11], [16, 2], [4, 11])]
    model.cuda_graphs = False
    plain = [run(keep) for keep in ([4, 11], [16, 2], [4, 11])]
    for got, want in zip(graphed, plain, strict=True):
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
