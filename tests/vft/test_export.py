"""torch.export of the encoder and of the decoder's velocity, with the kernels inside as ops."""

import copy
import io

import pytest
import torch
from small_tokenizer import small
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flexkernels import SequenceLayout

FRAMES = 3


@pytest.fixture(scope="module")
def programs():
    tokenizer = small().prepare()
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    config = tokenizer.config
    latents = torch.randn(config.channels, FRAMES, 4, 4)
    codes = torch.randn(FRAMES * config.registers, len(config.levels))
    with torch.no_grad():
        return {
            "encoder": (encoder, ([latents],)),
            "decoder": (decoder, ([latents], torch.tensor([0.3]), codes, [config.registers], [0], [False])),
        }


def exported(module, arguments):
    with torch.no_grad():
        return torch.export.export(module, arguments)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_reloaded_program_gives_the_same(programs, part):
    module, arguments = programs[part]
    program = exported(module, arguments)
    ops = {str(node.target) for node in program.graph.nodes}
    assert any(op.startswith("flexkernels.attention") for op in ops), ops
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    with torch.no_grad():
        for scale in (1.0, 0.3):
            given = copy.deepcopy(arguments)
            given[0][0] = given[0][0] * scale
            torch.testing.assert_close(reloaded(*given), module(*given), rtol=1e-6, atol=1e-6)


def test_decoding_in_inference_mode_leaves_training_possible(programs):
    module, arguments = programs["decoder"]
    frames = [torch.randn(module.config.channels, 5, 4, 4)]
    codes = torch.randn(5 * module.config.registers, len(module.config.levels), requires_grad=True)
    rest = [module.config.registers], [0], [False]
    with torch.inference_mode():
        module(frames, arguments[1], codes, *rest)
    module(frames, arguments[1], codes, *rest)[0].sum().backward()
    assert codes.grad is not None


def test_fake_tensors_leave_the_cache_alone():
    frames = [[(5, 2), (6, 3)]]
    with FakeTensorMode():
        assert isinstance(SequenceLayout.cached(frames).frame.clone(), FakeTensor)
    assert type(SequenceLayout.cached(frames).frame.clone()) is torch.Tensor


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_ahead_of_time_compiled(programs, part, tmp_path):
    module, arguments = programs[part]
    package = torch._inductor.aoti_compile_and_package(
        exported(module, arguments), package_path=str(tmp_path / "model.pt2")
    )
    with torch.no_grad():
        got, want = torch._inductor.aoti_load_package(package)(*arguments), module(*arguments)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
