"""The tokenizer's training loss in plain PyTorch: dense masks, all registers, modulation rows a token, no packing."""

import torch
import torch.nn.functional as F

from vft.layers import patchify, unpatchify
from vft.train.loss import RANGE_WEIGHT, VALUE_RANGE

from .tokenizer import layer_norm


def masks(frames, patches, registers, device):
    """Dense bool [L, L] of the encoder (earlier frames; own frame causal over registers) and of the decoder.

    Source: arXiv 2604.12887, the masks of its encoder and decoder.
    """
    frame = torch.arange(frames, device=device).repeat_interleave(patches + registers)
    index = torch.arange(patches + registers, device=device).repeat(frames)
    earlier, own = frame[None, :] < frame[:, None], frame[None, :] == frame[:, None]
    return earlier | own & ((index[None, :] <= index[:, None]) | (index[None, :] < patches)), earlier | own


def attention(attn, h, mask):
    """Source: the blocks of arXiv 2604.12887, their masks given to SDPA."""
    q, k, v = (w(h).unflatten(-1, (attn.heads, attn.head_dim)) for w in (attn.wq, attn.wk, attn.wv))
    q, k, v = (y.transpose(1, 2) for y in (layer_norm(q), layer_norm(k), v))
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=8 / attn.head_dim)
    return attn.proj(h.transpose(1, 2).flatten(2))


def mlp(branch, h):
    """Source: arXiv 2002.05202, equation 6."""
    return branch.fc2(F.silu(branch.fc1(h)) * branch.fc3(h))


def encode(encoder, patches, grid, mask):
    """Patch vectors [B, T * P, D] -> register values [B, T * N, levels]. Source: the encoder of arXiv 2604.12887."""
    batch, t = len(patches), grid[0]
    x = (encoder.patch_embed(patches) + encoder.patch_posemb(grid)).unflatten(1, (t, -1))
    x = torch.cat([x, encoder.registers[:t].expand(batch, -1, -1, -1)], 2)
    count, x = x.shape[2] - encoder.registers.shape[1], x.flatten(1, 2)
    for block in encoder.blocks:
        x = x + attention(block.attn, layer_norm(x), mask)
        x = x + mlp(block.mlp, layer_norm(x))
    return encoder.head(layer_norm(x).unflatten(1, (t, -1))[:, :, count:].flatten(1, 2))


def embed_registers(decoder, codes, choices, frames):
    """Source: nested and condition dropout of arXiv 2604.12887, by overwriting registers."""
    n = decoder.config.registers
    x = decoder.code_embed(codes) + decoder.register_posemb((frames, n))
    index = torch.arange(n, device=x.device).repeat(frames)
    frame = torch.arange(frames, device=x.device).repeat_interleave(n)
    masked = index >= torch.tensor(choices.keep, device=x.device)[:, None]
    prefix = frame < torch.tensor(choices.prefix_frames, device=x.device)[:, None]
    null = torch.tensor(choices.null, device=x.device)[:, None].expand_as(masked)
    for hit, token in ((masked, decoder.mask_token), (prefix, decoder.prefix_token), (null, decoder.null_token)):
        x = torch.where(hit[..., None], token.to(x.dtype), x)
    return x


def velocity(decoder, patches, t, registers, grid, mask):
    """Patch vectors [B, T * P, D] and registers [B, T * N, width] -> the velocity's patch vectors.

    Source: the decoder of arXiv 2604.12887.
    """
    frames = grid[0]
    x = (decoder.patch_embed(patches) + decoder.patch_posemb(grid)).unflatten(1, (frames, -1))
    count = x.shape[2]
    x = torch.cat([x, registers.unflatten(1, (frames, -1))], 2)
    part = (torch.arange(x.shape[2], device=x.device) >= count).long().repeat(frames)
    x = x.flatten(1, 2)
    temb = decoder.time_embed(t)
    for block in decoder.blocks:
        rows = block.adaLN_modulation(temb).unflatten(1, (2, -1))[:, part]
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = rows.chunk(6, -1)
        x = x + gate_attn * attention(block.attn, layer_norm(x) * (1 + scale_attn) + shift_attn, mask)
        x = x + gate_mlp * mlp(block.mlp, layer_norm(x) * (1 + scale_mlp) + shift_mlp)
    x = x.unflatten(1, (frames, -1))[:, :, :count].flatten(1, 2)
    shift, scale = decoder.head_modulation(F.silu(temb))[:, None].chunk(2, -1)
    return decoder.head(layer_norm(x) * (1 + scale) + shift)


def loss(model, latents, choices, dense):
    """What vft.train.loss.flow_loss computes, for latents [B, C, T, H, W]; dense: what :func:`masks` gives.

    Source: the rectified-flow loss of arXiv 2209.03003, equation 1.
    """
    config = model.config
    grid = tuple(n // p for n, p in zip(latents.shape[2:], config.patch, strict=True))
    batch = len(latents)
    values = encode(model.encoder, patchify(latents, config.patch).unflatten(0, (batch, -1)), grid, dense[0])
    codes = straight_through(values.float(), config.levels)
    prefix = torch.tensor(choices.prefix_frames, device=latents.device)
    frames = torch.arange(grid[0], device=latents.device) >= prefix[:, None]
    t = torch.where(frames, choices.t[:, None], choices.prefix_t[:, None])[:, None, :, None, None]
    noise = torch.stack(choices.noise)
    noised = patchify((1 - t) * latents + t * noise, config.patch).unflatten(0, (batch, -1))
    registers = embed_registers(model.decoder, codes, choices, grid[0])
    out = velocity(model.decoder, noised, choices.t, registers, grid, dense[1])
    out = torch.stack(unpatchify(out.flatten(0, 1), batch * [grid], config.patch))
    error = (out - (noise - latents)).square().mean((1, 3, 4))
    beyond = (values.abs() - VALUE_RANGE).clamp(min=0).square().mean()
    return ((error * frames).sum(1) / frames.sum(1)).mean() + RANGE_WEIGHT * beyond


def straight_through(z, levels):
    """Source: arXiv 2309.15505, appendix A.1."""
    levels = torch.tensor(levels, dtype=z.dtype, device=z.device)
    half, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) * 0.5
    bound = (z + torch.atanh(offset / half)).tanh() * half - offset
    return (bound + (bound.round() - bound).detach()) / (levels // 2)


def cross_entropy(h, table, ids):
    """Source: torch.nn.functional.cross_entropy, PyTorch documentation; logits in h's dtype, as autocast makes them."""
    return F.cross_entropy(F.linear(h, table).float(), ids)
