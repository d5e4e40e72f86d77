"""The tokenizer's engine: collapse, schedule tables, joined weights, compilation; all of them exact."""

import copy

import pytest
import torch
from test_golden import CASES, load, samples

import vft
from vft import layers
from vft.config import make_config, parse_config
from vft.modulation import ModulationTable
from vft.packing import Member, Packing, packing
from vft.solver import SOLVERS, interval

T = 0.6


def close(got, want):
    for g, w in zip(got, want, strict=True):
        assert float((g - w).norm()) <= 1e-5 * float(w.norm())


# --- collapse


@pytest.mark.parametrize("case", CASES)
def test_collapse_is_exact_for_every_keep(case):
    model, io, _ = load(case)
    x, ids = [io["noised_0"][0]], [io["tokens_0"][0]]
    for keep in range(model.registers + 1):
        for unconditional in (False, True):
            options = dict(keep=keep, unconditional=unconditional)
            got, want = (model.velocity(x, T, ids, **options, collapse=collapse) for collapse in (True, False))
            close(got, want)


@pytest.mark.parametrize("case", CASES)
def test_collapse_is_exact_with_prefixes_and_ragged_batches(case):
    model, _, _ = load(case)
    shapes = [(16, 5, 8, 8), (16, 1, 4, 8), (16, 3, 6, 2), (16, 2, 4, 4)]
    latents = [torch.randn(shape) for shape in shapes]
    ids = model.encode_latents(latents)
    options = dict(keep=[16, 0, 3, 7], unconditional=[False, False, True, False], prefix_frames=[2, 1, 0, 0])
    got, want = (model.velocity(latents, T, ids, **options, collapse=collapse) for collapse in (True, False))
    close(got, want)


@pytest.mark.parametrize("case", CASES)
def test_the_sampler_with_and_without_collapse(case):
    model, io, _ = load(case)
    ids, noise = samples(io, "tokens"), samples(io, "noise")
    prefix = [x[:, :1] for x in noise]

    def run(collapse):
        return model.decode_latents(ids, [4, 11], 4, vft.CFG(3.0), noise=noise, prefix=prefix, collapse=collapse)

    for got, want in zip(run(True), run(False), strict=True):
        assert float((got - want).norm()) <= 2e-5 * float(want.norm())


def tokens(case, keep, null=False, prefix=0, frames=5, patches=16):
    """Packed tokens of one sequence and, sorted, what its merged keys count."""
    model, _, _ = load(case)
    config = model.config
    grids, members = ((frames, 4, patches // 4),), (Member(0, keep, prefix, null),)
    made = packing(grids, members, config.registers, config.register_ops, config.decoder, True, torch.device("cpu"))
    weight = made.key_log_weight
    counts = [] if weight is None else sorted(weight.exp().round().int()[weight > 0].tolist())
    return made.layout.total, counts


def test_what_is_collapsed():
    patches = 5 * 16
    # keep 4 of 16: 4 registers and one that stands for 12, in each of 5 frames
    assert tokens("base", 4) == (patches + 5 * 5, [12] * 5)
    assert tokens("base", 16) == (patches + 5 * 16, [])
    assert tokens("base", 0) == (patches + 5, [16] * 5)
    assert tokens("base", 4, null=True) == (patches + 5, [16] * 5)
    assert tokens("base", 15) == (patches + 5 * 16, [])
    # two conditioning frames become one token each
    assert tokens("base", 4, prefix=2) == (patches + 2 + 3 * 5, [12] * 3 + [16] * 2)
    # where every frame sees every frame, one token serves them all
    assert tokens("fulldec", 4) == (patches + 5 * 4 + 1, [5 * 12])
    assert tokens("fulldec", 4, null=True) == (patches + 1, [5 * 16])
    # the mask token gets a position afterwards: no two registers are alike, but the null token still is
    assert tokens("early_drop", 4) == (patches + 5 * 16, [])
    assert tokens("early_drop", 4, null=True) == (patches + 5, [16] * 5)


def test_no_collapse_where_the_mask_tells_registers_apart():
    model, _, _ = load("base")
    trunk = model.config.encoder
    assert trunk.mask == "frame_causal_prefix"
    made = Packing(((5, 4, 4),), (Member(0, 4),), 16, model.config.register_ops, trunk, True, torch.device("cpu"))
    assert made.layout.total == 5 * 32 and made.key_log_weight is None


def test_collapse_has_the_same_gradients():
    model, io, _ = load("base")
    x, codes = samples(io, "noised"), torch.randn(sum(i.numel() for i in samples(io, "tokens")), 6)
    gradients = []
    for collapse in (True, False):
        decoder = copy.deepcopy(model.decoder).requires_grad_()
        out = decoder(x, torch.tensor([0.3, 0.8]), codes, [4, 11], [0, 1], [False, False], collapse)
        sum(v.square().sum() for v in out).backward()
        gradients.append([p.grad for p in decoder.parameters() if p.grad is not None])
    for got, want in zip(*gradients, strict=True):
        assert float((got - want).norm()) <= 2e-5 * float(want.norm()) + 1e-6


# --- what is computed before the loop


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


# --- joined weights


def odd_model():
    torch.manual_seed(0)
    raw = make_config(encoder_width=64, decoder_width=192, head_dim=32, registers=4, codec="linear", size=32)
    model = vft.Tokenizer(parse_config(raw)).eval().requires_grad_(False)
    for p in model.decoder.parameters():
        p.copy_(torch.randn_like(p) * 0.1)
    return model


def test_prepared_weights_are_views_and_change_nothing(tmp_path):
    model = odd_model()
    plain = {name: p.clone() for name, p in model.named_parameters()}
    x, ids = [torch.randn(model.config.channels, 2, 4, 4)], [torch.randint(64000, (2, 4))]
    members = (Member(0, 4),)
    packed = model.decoder.packing(x, members, True)
    codes = torch.zeros(8, len(model.config.levels))
    velocity = lambda: model.decoder.velocity(  # noqa: E731
        x, model.decoder.embed_registers(codes, packed), model.decoder.modulation(torch.tensor([T])), packed
    )[0]
    before = velocity()
    attn, mlp = model.decoder.blocks[0].attn, model.decoder.blocks[0].mlp
    assert attn._joined is None
    model.prepare()
    joined = attn._joined["weight"]
    assert attn.wk.weight.data_ptr() == joined[192:].data_ptr()
    assert mlp.fc1.out_features == 512 and len(mlp._joined["weight"]) % (2 * layers.MLP_ALIGNMENT) == 0
    torch.testing.assert_close(velocity(), before, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        assert torch.equal(p, plain[name]), name
    # a change through a published name is seen, a copy is its own, and saving gives the original names and shapes
    other = copy.deepcopy(model)
    attn.wk.weight.mul_(2)
    assert torch.equal(joined[192:384], 2 * plain["decoder.blocks.0.attn.wk.weight"])
    assert torch.equal(other.decoder.blocks[0].attn.wk.weight, plain["decoder.blocks.0.attn.wk.weight"])
    other.prepare().save(tmp_path / "model.safetensors")
    again = vft.Tokenizer.from_pretrained(tmp_path / "model.safetensors")
    for name, p in again.named_parameters():
        assert torch.equal(p, plain[name]), name
    assert torch.equal(again.velocity(x, T, ids)[0], other.velocity(x, T, ids)[0])


def test_a_cast_model_prepares_anew():
    model = odd_model().prepare()
    model.to(torch.bfloat16)
    assert model.decoder.blocks[0].attn._joined is None
    model.prepare()
    assert model.decoder.blocks[0].mlp._joined["weight_out"].dtype == torch.bfloat16


def test_training_after_preparing_has_gradients():
    model = odd_model().prepare()
    model.requires_grad_()
    model.encoder([torch.randn(model.config.channels, 2, 4, 4)]).sum().backward()
    assert model.encoder.blocks[0].attn.wk.weight.grad.abs().sum() > 0


# --- bfloat16 and compilation


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
