"""A 3-D grid of tokens beside registers: rate, distortion, and what a generator makes of either.

    python bench/grid.py -o runs/grid [--json bench/results/grid.json] [--train PART ...]

The grid tokenizer has the same blocks, widths, codec, quantiser and loss; its tokens are the encoder's outputs at the
patches, and the decoder adds each token's code to its patch: no registers, no nested dropout. Both tokenizers start in
the same way (vft/train/initial.py) and see the same clips in the same order; then a generator of the same size is
trained on the tokens of each, and the classifier of ``vft eval`` names the motion in what it makes. Runs are resumed;
``--train`` trains the named parts alone, so that several processes may share the work.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from report import machine, write

import vft
from vft import evaluate
from vft.config import make_config
from vft.layers import Decoder, Encoder, embed_patches, grids_of, run_blocks, unpatchify
from vft.packing import TOKENS, Member, Packing
from vft.train import generator, initial, loop, state, tokenizer

# tokens a latent frame of the generators: as many as the grid has, and few registers
KEEPS = {"grid": (16,), "registers": (16, 4)}
# last steps of a run whose losses are averaged
LAST = 100


def patches_alone(latents, members, config, trunk) -> Packing:
    return Packing(grids_of(latents, config), members, 0, (), trunk, False, latents[0].device)


class GridEncoder(Encoder):
    """The values of a latent frame's tokens are the head's outputs at its patches."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_parameter("registers", None)

    def forward(self, latents):
        config, members = self.config, [Member(i, 0) for i in range(len(latents))]
        packed = patches_alone(latents, members, config, config.encoder)
        patches = embed_patches(latents, self.patch_embed, self.patch_posemb, grids_of(latents, config), config)
        return self.head(run_blocks(self.blocks, patches, packed, recompute=self.recompute))


class GridDecoder(Decoder):
    """The code of a token is added to its patch; where a sequence has none, the prefix or null token."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_posemb = None
        self.register_parameter("mask_token", None)

    def packing(self, latents, members, collapse=True, registers=None) -> Packing:
        packed = patches_alone(latents, members, self.config, self.config.decoder)
        count = [t * h * w for t, h, w in grids_of(latents, self.config)]
        first, rows = [sum(count[:i]) for i in range(len(count) + 1)], []
        for member, (_, h, w) in zip(members, packed.grids, strict=True):
            row = torch.arange(first[member.sample], first[member.sample + 1])
            row[: member.prefix_frames * h * w] = first[-1] + TOKENS.index("prefix")
            rows.append(torch.full_like(row, first[-1] + TOKENS.index("null")) if member.null else row)
        packed.register_base = torch.cat(rows).to(latents[0].device)
        return packed

    def velocity(self, latents, registers, modulation, packed):
        config = self.config
        patches = embed_patches(latents, self.patch_embed, self.patch_posemb, grids_of(latents, config), config)
        x = patches.index_select(0, packed.order) + registers
        h = run_blocks(self.blocks, x, packed, modulation, self.recompute)
        return unpatchify(self.head(h), packed.grids, config.patch)


class GridTokenizer(vft.Tokenizer):
    """One token for each patch of a latent frame: ids ``[T, rows * columns]``."""

    def __init__(self, config, name="grid") -> None:
        super().__init__(config, name)
        self.encoder, self.decoder = GridEncoder(config), GridDecoder(config)


class GridTask(tokenizer.TokenizerTask):
    made = GridTokenizer

    def _begin(self) -> None:
        model, side = self.model, round(self.model.registers**0.5)
        codes = initial.Codes(model.config.max_frames, side, side)
        for part in (model.encoder, model.decoder):
            initial.place_patches(part, codes)
            for block in part.blocks:
                initial.aim(block.attn, codes, initial.PATCH)
        with torch.no_grad():
            model.decoder.code_embed.weight[: codes.count] = 0
        initial.follow_input(model.decoder, codes)
        initial.spread_values(model.encoder, self.data.batch(range(min(64, self.settings.clips))))


# of each kind of tokens: registers of a latent frame, what trains it, what it is
KINDS = {
    "grid": (16, GridTask, GridTokenizer),
    "registers": (32, tokenizer.TokenizerTask, vft.Tokenizer),
}


def train(part: str, folder: Path, args) -> None:
    """Trains ``KIND``, or ``KIND-K``: a generator of the first K of its tokens."""
    kind, _, keep = part.partition("-")
    registers, task, model = KINDS[kind]
    engine = loop.Engine(device=args.device)
    if not keep:
        settings = tokenizer.TokenizerSettings(steps=args.steps, clips=args.clips, bf16=args.bf16)
        config = make_config(**tokenizer.TINY | {"codec": "lapped", "channels": 24, "registers": registers})
        torch.manual_seed(settings.seed)
        loop.train(folder / part, settings, task(settings, config), engine=engine)
        return
    settings = generator.GeneratorSettings(
        steps=args.generator_steps, clips=args.clips, tokens_per_frame=int(keep), bf16=args.bf16,
        tokenizer=str(folder / kind),
    )  # fmt: skip
    tokens = model.from_pretrained(folder / kind)
    torch.manual_seed(settings.seed)
    loop.train(folder / part, settings, generator.GeneratorTask(settings, tokens), engine=engine)


def report(folder: Path, args) -> dict:
    """On the CPU, as ``vft eval``."""
    names = ("steps", "generator_steps", "clips", "bf16", "samples")
    found = {
        "what": "tokens at the patches beside registers, trained alike", "machine": machine("cpu"),
        "settings": {name: getattr(args, name) for name in names},
    }  # fmt: skip
    judge = None
    for kind, (registers, _, model) in KINDS.items():
        tokens = model.from_pretrained(folder / kind)
        keeps = evaluate.budgets(registers) if kind == "registers" else [registers]
        row = {
            "parameters": sum(p.numel() for p in tokens.parameters()),
            "held-out clips": evaluate.held_out(tokens, args.samples, keeps), "generators": {},
        }  # fmt: skip
        for keep in KEEPS[kind]:
            model_folder = folder / f"{kind}-{keep}"
            made = vft.Generator.from_pretrained(model_folder)
            judge = judge or evaluate.judge(tokens, args.samples)
            loss = statistics.mean(line["loss"] for line in state.read_log(model_folder)[-LAST:])
            row["generators"][str(keep)] = {
                "tokens a clip": made.config.seq_len, "loss, nats a token": round(loss, 4),
                "loss, nats a clip": round(loss * made.config.seq_len, 1),
                "class accuracy": evaluate.class_accuracy(made, tokens, judge[0], args.samples),
            }  # fmt: skip
        found[kind] = row
    return found


def main() -> None:
    parts = [part for kind, keeps in KEEPS.items() for part in (kind, *(f"{kind}-{k}" for k in keeps))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--train", nargs="+", choices=parts, help="train these alone, and report nothing")
    parser.add_argument("--steps", type=int, default=2000, help="of a tokenizer (default %(default)s)")
    parser.add_argument("--generator-steps", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--clips", type=int, default=4000, help="different clips (default %(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="held-out and generated clips (default %(default)s)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for part in args.train or parts:
        train(part, args.output, args)
    if not args.train:
        found = report(args.output, args)
        print(json.dumps(found, indent=1))
        if args.json:
            write(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
