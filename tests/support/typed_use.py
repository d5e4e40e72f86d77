"""The main calls of flexkernels and vft as a user writes them under ``mypy --strict``, which must know every type.

``assert_type`` fails on a type that is another, Any included; it does nothing when this runs, which tests do too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import flexkernels
import vft
from vft.budget import Predictor
from vft.data import Decoder, Encoder, TokenDataset, open_shard, write_shard
from vft.features import Network, frechet_distance, lpips_distance
from vft.metrics import psnr, ssim
from vft.solver import interval, schedule
from vft.video import Video, read_video

LEVELS = (8, 8, 8, 5, 5, 5)


def quantizer(z: Tensor, weight: Tensor, want_codes: bool) -> None:
    codes, ids = flexkernels.fsq_quantize(z, LEVELS, ids_dtype=torch.int32)
    assert_type(codes, Tensor)
    assert_type(ids, Tensor)
    assert_type(flexkernels.fsq_quantize(z, LEVELS, codes=False), tuple[None, Tensor])
    assert_type(flexkernels.fsq_quantize(z, LEVELS, ids=False)[0], Tensor)
    assert_type(flexkernels.fsq_quantize(z, LEVELS, codes=want_codes), tuple[Tensor | None, Tensor | None])
    assert_type(flexkernels.fsq_quantize_ref(z, LEVELS), tuple[Tensor, Tensor])
    assert_type(flexkernels.fsq_dequantize(ids, LEVELS), Tensor)
    assert_type(flexkernels.fsq_quantize_train(z, LEVELS, seed=0, drop_p=0.1), tuple[Tensor, Tensor])
    hidden = z @ weight
    assert_type(flexkernels.fsq_project_quantize(hidden, weight, None, LEVELS), Tensor)
    both = flexkernels.fsq_project_quantize(hidden, weight, None, LEVELS, return_codes=True)
    assert_type(both, tuple[Tensor, Tensor])
    assert_type(flexkernels.fsq_embed(ids, LEVELS, weight.T.contiguous()), Tensor)


def attention(x: Tensor, want_lse: bool) -> None:
    layout = flexkernels.SequenceLayout([[(2, 1)] * 2, [(2, 2)]], "frame_causal_prefix")
    assert_type(layout.total, int)
    assert_type(flexkernels.SequenceLayout.cached([[(4, 0)]]), flexkernels.SequenceLayout)
    packed = flexkernels.SequenceLayout.from_lengths([4, 6], "causal")
    q = x[: layout.total].view(layout.total, 2, -1)
    assert_type(flexkernels.attention(q, q, q, layout), Tensor)
    out, lse = flexkernels.attention(q, q, q, layout, return_lse=True)
    assert_type(lse, Tensor)
    assert_type(flexkernels.attention(q, q, q, packed, return_lse=want_lse), Tensor | tuple[Tensor, Tensor])
    assert_type(flexkernels.attention_ref(q, q, q, layout, return_lse=True), tuple[Tensor, Tensor])
    assert_type(flexkernels.flash_attn_varlen_func(q, q, q, packed.cu_seqlens, packed.cu_seqlens), Tensor)
    query, cache, length = out[None, :1], q.transpose(0, 1)[None], torch.tensor([3], dtype=torch.int32)
    assert_type(flexkernels.decode_attention(query, cache, cache, length), Tensor)
    assert_type(flexkernels.decode_attention(query, cache, cache, length, return_lse=True), tuple[Tensor, Tensor])
    assert_type(flexkernels.decode_attention_ref(query, cache, cache, length), Tensor)
    merged, keys = q[None, :1].flatten(2).repeat(1, 1, 3), cache.clone()
    assert_type(flexkernels.kv_append_(merged, keys, keys.clone(), length, heads=2, norm="rms"), Tensor)
    assert_type(flexkernels.qk_norm(merged[0], 2), tuple[Tensor, Tensor, Tensor])


def blocks(x: Tensor, residual: Tensor | None) -> None:
    weight = torch.ones(x.shape[1])
    assert_type(flexkernels.rms_norm(x, weight), Tensor)
    assert_type(flexkernels.rms_norm(x, weight, residual=x), tuple[Tensor, Tensor])
    assert_type(flexkernels.rms_norm(x, weight, residual=residual), Tensor | tuple[Tensor, Tensor])
    assert_type(flexkernels.adaln_norm(x), Tensor)
    assert_type(flexkernels.gated_residual_adaln_norm(x, x), tuple[Tensor, Tensor])
    assert_type(flexkernels.gated_residual(x, x, x[:1]), Tensor)
    assert_type(flexkernels.swiglu(x), Tensor)
    assert_type(flexkernels.skinny_linear(x[:4], x.clone()), Tensor)


def sampling(logits: Tensor) -> None:
    assert_type(flexkernels.sample_logits(logits, top_k=8, seed=1), Tensor)
    drawn, logprob = flexkernels.sample_logits(logits, temperature=0.5, return_logprob=True)
    assert_type((drawn, logprob), tuple[Tensor, Tensor])
    assert_type(flexkernels.sample_logits_ref(logits), Tensor)


def backends() -> None:
    for name, reason in flexkernels.available_backends().items():
        assert_type(name, str)
        assert_type(reason, str | None)
    with flexkernels.backend("reference"):
        assert_type(flexkernels.swiglu(torch.ones(2, 4)), Tensor)


def tokenizer(file: Path, work: Path) -> vft.VideoTokens:
    model = vft.Tokenizer.from_pretrained("tiny", dtype=torch.float32)
    assert_type(model, vft.Tokenizer)
    assert_type(model.size, int | None)
    model.steps, model.guidance = 1, vft.CFG(2.0)
    tokens = model.encode(file, fps=8.0)
    assert_type(tokens, vft.VideoTokens)
    assert_type(model.encode(read_video(file, model.size)), vft.VideoTokens)
    assert_type(model.encode(torch.zeros(1, 3, 17, 128, 128)), vft.VideoTokens | list[vft.VideoTokens])
    tokens.truncate(8).save(work / "coarse.vft")
    assert_type(vft.VideoTokens.load(work / "coarse.vft").ids, Tensor)
    video = model.decode(tokens, keep=2, steps=1, guidance=vft.CFG(interval(2.0, 0.2, 0.8)))
    assert_type(video, Tensor)
    assert_type(model.decode_stream(tokens, steps=1), Iterator[Tensor])
    latents = model.codec.encode(video[:, :, :17])
    assert_type(latents, Tensor)
    ids = model.encode_latents(latents)
    assert_type(ids, list[Tensor])
    assert_type(model.decode_latents(ids, keep=[4], guidance=vft.APG(scale=5.0), steps=schedule(1)), list[Tensor])
    assert_type(model.velocity(latents, 0.5, ids), list[Tensor])
    assert_type(psnr(video, video), Tensor)
    assert_type(ssim(video, video), Tensor)
    model.save_pretrained(work / "mine", data="procedural clips")
    return tokens


def budgets(model: vft.Tokenizer, predictor: Predictor, clips: Tensor) -> vft.VideoTokens | list[vft.VideoTokens]:
    return model.encode(clips, target_psnr=30.0, budget=1000, predictor=predictor)


def generator(model: vft.Tokenizer) -> None:
    gen = vft.Generator.from_pretrained("tiny", weights="int8")
    assert_type(gen.classes, tuple[str, ...])
    ids = gen.generate("zoom", tokens_per_frame=1, frames=1, top_p=0.9)
    assert_type(ids, Tensor)
    assert_type(gen.stream(0, tokens_per_frame=1, frames=1), Iterator[Tensor])
    assert_type(gen.generate_tokens(model, "pan", tokens_per_frame=1, frames=1), list[vft.VideoTokens])
    assert_type(gen.logits(vft.time_first(ids), "zoom"), Tensor)
    session = gen.session(max_rows=2)
    assert_type(session.add("zoom", tokens_per_frame=1, frames=1), int)
    while session.waiting or session.running:
        session.step()
    for handle, made in session.finished():
        assert_type(handle, int)
        assert_type(made, Tensor)


def data(file: Path, work: Path) -> None:
    rows = Encoder("tiny", keep=8)([{"path": str(file)}])
    write_shard(work / "train-000.tar", rows)
    dataset = TokenDataset(work / "train-000.tar", keep=4)
    assert_type(len(dataset), int)
    assert_type(dataset.damaged(), dict[str, str])
    stream = dataset.stream(seed=0, shuffle=False)
    for row in stream:
        assert_type(row, dict[str, Any])
    stream.load_state_dict(stream.state_dict())
    assert_type(open_shard(work / "train-000.tar").keys(), list[str])
    Decoder("tiny", steps=1)(rows)


def metrics(network: Network, real: Tensor, made: Tensor) -> float:
    assert_type(lpips_distance([real], [made], [real[0, :, 0, 0]]), Tensor)
    return frechet_distance(network.features(real), network.features(made))


def main(file: Path, work: Path) -> None:
    x = torch.randn(10, 16)
    quantizer(torch.randn(12, len(LEVELS)), torch.randn(len(LEVELS), 16), want_codes=False)
    attention(x, want_lse=True)
    blocks(x, residual=None)
    sampling(x)
    backends()
    tokens = tokenizer(file, work)
    generator(vft.Tokenizer.from_pretrained("tiny"))
    data(file, work)
    frames = Video(torch.zeros(1, 128, 128, 3, dtype=torch.uint8), 8.0, 128, 128)
    assert_type(frames.frames, Tensor)
    assert tokens.registers >= 1
