"""What the modules of a published config hand to each other.

The published code runs the modules of a side in order over one dictionary; the ``*_key`` fields say what each reads and
writes. :func:`follow` walks them with the name of what each entry holds, and refuses by name what would be computed
otherwise here. Configs that this package makes leave the keys out, and mean the only order there is.
"""

from __future__ import annotations

from .schema import ConfigError, kind_of

INPUT, CHANNELS_LAST, PATCHES, REGISTERS = "the input", "channels-last latents", "patches", "registers"
SEQUENCE, MASK, TIME, PACKING = "the packed sequence", "the block mask", "the time embedding", "the packing function"
OUTPUT, PATCHES_OUT, REGISTERS_OUT, LATENTS = "the trunk's output", "output patches", "output registers", "latents"

# what a module of each class reads and writes: the label of a key, or of a list of keys
_READS = {
    "PatchEmbedder": {"input_tensor_list_read_key": CHANNELS_LAST},
    "LinearLayer": {"read_key": INPUT},
    "MaskedNestedDropout": {"read_write_key": REGISTERS},
    "MaskedPrefixDropout": {"read_write_key": REGISTERS},
    "LearnedNullCond": {"read_write_key": REGISTERS},
    "TimestepEmbedder": {"timesteps_read_key": INPUT},
    "BlockWiseSequenceInterleavePacker": {"input_list_read_keys": [PATCHES, REGISTERS]},
    "FlexTransformer": {"input_seq_read_key": SEQUENCE, "block_mask_read_key": MASK},
    "SequenceInterleavedUnpacker": {"packed_seq_read_key": OUTPUT},
    "LinearHead": {"read_key": REGISTERS_OUT},
    "ToPatchesLinearHead": {"read_key": PATCHES_OUT},
}
_WRITES = {
    "PatchEmbedder": {"patches_list_write_key": PATCHES},
    "RegistersTemporal2D": {"registers_write_key": REGISTERS},
    "LinearLayer": {"write_key": REGISTERS},
    "TimestepEmbedder": {"time_embedding_write_key": TIME},
    "BlockWiseSequenceInterleavePacker": {
        "packed_seq_write_key": SEQUENCE, "block_mask_write_key": MASK, "emb_packing_fn_write_key": PACKING,
    },
    "FlexTransformer": {"output_seq_write_key": OUTPUT},
    "SequenceInterleavedUnpacker": {"inner_seq_write_keys": [PATCHES_OUT, REGISTERS_OUT]},
    "ToPatchesLinearHead": {"write_key": LATENTS},
}  # fmt: skip
# what reads the time: always, never, or where the config says so
_TIMED = {
    ("decoder", "FlexTransformer"): {"adaLN_emb_read_key": (TIME,), "adaLN_packing_fn_read_key": (PACKING,)},
    ("decoder", "ToPatchesLinearHead"): {"adaLN_emb_read_key": (TIME, None), "adaLN_packing_fn_read_key": (None,)},
    ("encoder", "FlexTransformer"): {"adaLN_emb_read_key": (None,)},
    ("encoder", "LinearHead"): {"adaLN_emb_read_key": (None,)},
}
_COMMON = {
    "PerSampleOp", "PatchEmbedder", "PositionalEmbeddingAdder", "BlockWiseSequenceInterleavePacker", "FlexTransformer",
    "SequenceInterleavedUnpacker", "TransformerHead",
}  # fmt: skip
_KINDS = {
    "encoder": _COMMON | {"RegistersTemporal2D", "LinearHead"},
    "decoder": _COMMON
    | {"LinearLayer", "ToPatchesLinearHead", "TimestepEmbedder"}
    | {"MaskedNestedDropout", "MaskedPrefixDropout", "LearnedNullCond"},
}


def follow(side: str, modules: dict) -> dict[str, str]:
    """What each ``PositionalEmbeddingAdder`` adds positions to, PATCHES or REGISTERS, by module name.

    Raises ConfigError naming the field that reads something else than the module computes with here.
    """
    for name, entry in modules.items():
        if kind_of(entry, name) not in _KINDS[side]:
            raise ConfigError(f"{side}.{name}: a {kind_of(entry, name)} in the {side} is not supported")
    packers = [e for e in modules.values() if kind_of(e, side) == "BlockWiseSequenceInterleavePacker"]
    if not all("input_list_read_keys" in packer for packer in packers):
        return _by_order(modules)
    return _Walk(side).run(modules)


def _by_order(modules: dict) -> dict[str, str]:
    registers = [e.get("write_key") for e in modules.values() if kind_of(e, "decoder") == "LinearLayer"]
    added = {n: e for n, e in modules.items() if kind_of(e, n) == "PositionalEmbeddingAdder"}
    return {n: REGISTERS if e.get("read_key") in registers else PATCHES for n, e in added.items()}


class _Walk:
    def __init__(self, side: str) -> None:
        self.side = side
        # what stands under each key
        self.held: dict[str, str] = {}

    def run(self, modules: dict) -> dict[str, str]:
        added = {}
        for name, entry in modules.items():
            kind, where = kind_of(entry, name), f"{self.side}.{name}"
            if kind == "TransformerHead":
                continue
            for key, label in _READS.get(kind, {}).items():
                self.read(f"{where}.{key}", entry.get(key), label)
            for key, labels in _TIMED.get((self.side, kind), {}).items():
                self.read_time(f"{where}.{key}", entry.get(key), labels)
            if kind == "PositionalEmbeddingAdder":
                added[name] = self.add_positions(where, entry)
            if kind == "PerSampleOp":
                self.transpose(where, entry)
            if kind == "BlockWiseSequenceInterleavePacker":
                self.check_packer(where, entry)
                # what is changed after this is not packed any more
                self.held = {k: v for k, v in self.held.items() if v not in (PATCHES, REGISTERS)}
            for key, label in _WRITES.get(kind, {}).items():
                self.write(f"{where}.{key}", entry.get(key), label)
        return added

    def label(self, key) -> str:
        return self.held.get(key, INPUT) if isinstance(key, str) else "nothing"

    def read(self, path: str, key, wanted: str | list[str]) -> None:
        keys = key if isinstance(wanted, list) else [key]
        labels = wanted if isinstance(wanted, list) else [wanted]
        got = [self.label(k) for k in keys] if isinstance(keys, (list, tuple)) else []
        if got != labels:
            raise ConfigError(f"{path} must name {', then '.join(labels)}, got {key!r}: {', then '.join(got)}")

    def read_time(self, path: str, key, wanted: tuple[str | None, ...]) -> None:
        got = None if key is None else self.label(key)
        if got not in wanted:
            allowed = " or ".join("be null" if label is None else f"name {label}" for label in wanted)
            raise ConfigError(f"{path} must {allowed}, got {key!r}")

    def write(self, path: str, key, label: str | list[str]) -> None:
        if isinstance(label, list):
            if not isinstance(key, (list, tuple)) or len(key) != len(label):
                raise ConfigError(f"{path} must name {', then '.join(label)}, got {key!r}")
            self.held |= dict(zip(key, label, strict=True))
        elif isinstance(key, str):
            self.held[key] = label

    def add_positions(self, where: str, entry: dict) -> str:
        label = self.label(entry.get("read_key"))
        if label not in (PATCHES, REGISTERS):
            raise ConfigError(f"{where}.read_key must name patches or registers before they are packed, got {label}")
        if self.side == "encoder" and label == REGISTERS:
            raise ConfigError(f"{where}.read_key must name patches: positions of encoder registers are not supported")
        # later modules that name the old entry would change something that is not packed
        self.held[entry["read_key"]] = f"{label} without positions"
        self.write(f"{where}.write_key", entry.get("write_key"), label)
        return label

    def transpose(self, where: str, entry: dict) -> None:
        last = kind_of(entry.get("per_sample_op"), f"{where}.per_sample_op") == "channels_first_to_last"
        self.read(f"{where}.read_key", entry.get("read_key"), INPUT if last else LATENTS)
        self.write(f"{where}.write_key", entry.get("write_key"), CHANNELS_LAST if last else OUTPUT)

    def check_packer(self, where: str, entry: dict) -> None:
        if self.side == "decoder" and entry.get("per_subseq_embs") is not True:
            got = entry.get("per_subseq_embs", False)
            raise ConfigError(f"{where}.per_subseq_embs must be True in the decoder, got {got!r}")
