"""The published decoder's formula in plain PyTorch: dense masks, modulation rows a token, no collapse, two passes."""

import torch
import torch.nn.functional as F


def layer_norm(x):
    """Source: torch.nn.functional.layer_norm in float32 without parameters, as arXiv 2604.12887 normalises."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


class Decoder:
    """The velocity of one sample, frame by frame patches then registers, with the weights of a vft decoder.

    Source: the decoder of arXiv 2604.12887, its masks given to SDPA.
    """

    def __init__(self, decoder, grid, device):
        config = decoder.config
        self.decoder, self.config, self.grid = decoder, config, grid
        t, h, w = grid
        self.patches, self.registers = h * w, config.registers
        frame = torch.arange(t, device=device).repeat_interleave(self.patches + self.registers)
        self.mask = frame[None, :] <= frame[:, None]
        self.part = (torch.arange(len(frame), device=device) % (self.patches + self.registers) >= self.patches).long()

    def embed_registers(self, codes, keep, null):
        t, n = self.grid[0], self.registers
        x = self.decoder.code_embed(codes) + self.decoder.register_posemb((t, n)).to(codes.dtype)
        masked = (torch.arange(n, device=codes.device) >= keep).repeat(t)
        x = torch.where(masked[:, None], self.decoder.mask_token.to(x.dtype), x)
        return self.decoder.null_token.to(x.dtype).expand_as(x) if null else x

    def block(self, block, x, temb):
        heads, head_dim = block.attn.heads, block.attn.head_dim
        rows = block.adaLN_modulation(temb).view(2, -1)[self.part]
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = rows.chunk(6, -1)
        h = layer_norm(x) * (1 + scale_attn) + shift_attn
        q, k, v = (w(h).unflatten(-1, (heads, head_dim)) for w in (block.attn.wq, block.attn.wk, block.attn.wv))
        q, k, v = (y.transpose(0, 1)[None] for y in (layer_norm(q), layer_norm(k), v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=8 / head_dim)
        x = x + gate_attn * block.attn.proj(h[0].transpose(0, 1).flatten(1))
        h = layer_norm(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * block.mlp.fc2(F.silu(block.mlp.fc1(h)) * block.mlp.fc3(h))

    def __call__(self, latents, t, codes, keep, null):
        """latents [C, T, H, W], codes [T * N, D], t [1] -> velocity [C, T, H, W]."""
        decoder, (frames, h, w), patch = self.decoder, self.grid, self.config.patch
        x = latents.to(codes.dtype).view(-1, frames, h, patch[1], w, patch[2])
        x = decoder.patch_embed(x.permute(1, 2, 4, 3, 5, 0).reshape(frames * h * w, -1))
        x = (x + decoder.patch_posemb(self.grid).to(x.dtype)).view(frames, self.patches, -1)
        registers = self.embed_registers(codes, keep, null).view(frames, self.registers, -1)
        x = torch.cat([x, registers], 1).flatten(0, 1)
        temb = decoder.time_embed(t)
        for block in decoder.blocks:
            x = self.block(block, x, temb)
        x = x.view(frames, -1, x.shape[-1])[:, : self.patches].flatten(0, 1)
        shift, scale = decoder.head_modulation(F.silu(temb)).chunk(2, -1)
        x = decoder.head(layer_norm(x) * (1 + scale) + shift).view(frames, h, w, patch[1], patch[2], -1)
        return x.permute(5, 0, 1, 3, 2, 4).reshape(latents.shape)


def sample(decoder, noise, codes, keep, steps, guidance, update):
    """Euler steps of a conditional and an unconditional pass each; update(x, v_cond, v_uncond, dt) guides and steps.

    Source: the Euler sampler of arXiv 2604.12887.
    """
    x = noise
    for i in range(steps):
        t = torch.full((1,), 1 - i / steps, device=x.device)
        x = update(x, decoder(x, t, codes, keep, False), decoder(x, t, codes, keep, True), -1 / steps)
    return x
