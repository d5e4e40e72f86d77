"""Names of tensors as other programs leave them: what wrappers add is taken off, averaged weights go before plain ones.

module.encoder.x   DistributedDataParallel, DataParallel
_orig_mod.x        torch.compile; also _fsdp_wrapped_module and _checkpoint_wrapped_module, at any depth
model.x            Lightning and training states
ema.x, ema_model.x, model_ema.x, ...   exponential moving averages, alone or beside the weights they average
"""

from __future__ import annotations

from collections.abc import Iterable

# parts of a name that no published model has, at any depth
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# first parts of a name
_AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict", "averaged_model")
# what an average keeps beside the weights
_BOOKKEEPING = ("decay", "num_updates", "initted", "step", "n_averaged")
_CONTAINERS = ("model", "online_model", "state_dict", "video_tokenizer")


def published_names(keys: Iterable[str]) -> dict[str, str]:
    """The name without wrappers of every tensor that counts, and the key that it stands under.

    Where some keys begin with the name of an average, only these count. Raises ValueError where two keys have one name.
    """
    parts = {key: [p for p in key.split(".") if p not in _WRAPPERS] for key in keys}
    averaged = {key: p for key, p in parts.items() if len(p) > 1 and p[0] in _AVERAGES and p[1] not in _BOOKKEEPING}
    names: dict[str, str] = {}
    for key, part in (averaged or parts).items():
        while len(part) > 1 and part[0] in (*_AVERAGES, *_CONTAINERS):
            part = part[1:]
        name = ".".join(part)
        if name in names:
            raise ValueError(f"the keys {names[name]} and {key} both stand for {name}")
        names[name] = key
    return names
