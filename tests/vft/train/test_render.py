"""Pictures of procedural clips: those that models were trained on, one by one and many at once, on any device."""

import importlib
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from host_copies import forbidden
from paths import PROCEDURAL
from safetensors.torch import load_file
from train_worker import SMALL

from vft.train import data, named, procedural, render
from vft.train.loop import draws
from vft.train.scene import FAMILIES, SHAPES
from vft.train.tokenizer import TokenizerSettings, TokenizerTask

CPU, META = torch.device("cpu"), torch.device("meta")
# of the renderer that the embedded models have seen: every family and recipe, words, sizes of 16 to 128; the first, the
# middle and the last frame, every third row and column
STORED = load_file(PROCEDURAL)


def plan_of(key):
    """The plan of a stored clip: kind.seed.index.size.frames.recipe."""
    kind, *numbers = key.split(".")
    seed, index, size, frames, recipe = map(int, numbers)
    if kind == "named":
        return named.plan(seed, index, size, frames)
    return procedural.plan(seed, index, size, frames, recipe)


def stored_part(clip):
    return clip[[0, len(clip) // 2, len(clip) - 1]][:, ::3, ::3]


def check_rounding(clips, wanted):
    """At most one of 255 levels apart, and that in less than 1 of 1,000 values."""
    change = (torch.stack(clips).int() - torch.stack(wanted).int()).abs()
    assert change.max() <= 1 and (change > 0).float().mean() < 1e-3


def alike(keys):
    """Stored clips of one size and length."""
    groups = {}
    for key in keys:
        groups.setdefault(tuple(key.split(".")[3:5]), []).append(key)
    return groups.values()


def test_what_is_stored_has_everything():
    found = [key.split(".") for key in STORED]
    assert {(procedural.label(int(k[1]), int(k[2])), k[5]) for k in found if k[0] == "procedural"} == {
        (family, recipe) for family in range(len(FAMILIES)) for recipe in "12"
    }
    assert {int(kind) for key in STORED for kind in plan_of(key).kinds} == set(range(len(SHAPES)))


def test_one_by_one_they_are_those_that_models_were_trained_on():
    for keys in alike(STORED):
        check_rounding([stored_part(render.one(plan_of(key))) for key in keys], [STORED[key] for key in keys])


def test_many_at_once_are_the_same():
    for keys in alike(key for key in STORED if key.split(".")[3] != "128"):
        clips = render.together([plan_of(key) for key in keys], CPU)
        check_rounding([stored_part(clip) for clip in clips], [STORED[key] for key in keys])


def test_groups_keep_the_order(monkeypatch):
    plans = [procedural.plan(3, i, 16, 3, 2) for i in range(7)]
    monkeypatch.setattr(render, "AT_ONCE", 3 * 3 * 16 * 16)
    check_rounding(list(render.together(plans, CPU)), [render.one(plan) for plan in plans])


def test_a_plan_without_objects_is_its_background():
    plan = procedural.plan(0, 0, 16, 3)
    nothing = {name: getattr(plan, name)[:0] for name in ("kinds", "objects", "motion")}
    empty = replace(plan, images=plan.images[-1:], **nothing)
    both = render.together([empty, plan], CPU)
    check_rounding(list(both), [render.one(empty), render.one(plan)])
    check_rounding(list(render.together([empty], CPU)), [render.one(empty)])


@pytest.fixture
def uploads(monkeypatch):
    """How many tensors each upload had; what it gives lies on "meta"."""
    found = []

    def upload(tensors, device, kept=False):
        if device.type == "cpu":
            return list(tensors)
        found.append(len(tensors))
        assert all(x.device.type == "cpu" for x in tensors)
        return [torch.empty(x.shape, dtype=x.dtype, device=device) for x in tensors]

    for name in ("flexkernels.layout", "vft.packing", "vft.train.render", "vft.train.data", "vft.train.loss"):
        monkeypatch.setattr(importlib.import_module(name), "upload", upload)
    return found


def test_a_device_gets_one_copy_a_batch_and_is_not_waited_for(uploads):
    plans = [procedural.plan(1, i, 16, 5, 2) for i in range(8)]
    made = forbidden(lambda: render.together(plans, META))
    assert made.shape == (8, 5, 16, 16, 3) and len(uploads) == 1


@pytest.mark.parametrize("words", [False, True])
def test_a_step_of_training_copies_without_waiting(words, uploads, monkeypatch):
    source = data.NAMED if words else data.PROCEDURAL
    # another seed: packings of equal numbers of registers are kept
    settings = TokenizerSettings(batch=4, clips=64, corruption=0.1, edges=1.0, recipe=2, data=source, seed=7 + words)
    # it knows no "meta"
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    task = TokenizerTask(settings, SMALL)
    task.data.start_workers(0, META)
    task.model.to(META)
    # the codec goes to the device at a first step, and what the encoder packs
    task.loss(draws(settings, 0)).backward()
    uploads.clear()
    forbidden(lambda: task.loss(draws(settings, 1)).backward())
    # clips; noise, times and replaced tokens; the decoder's layout; its packing
    assert len(uploads) == 4
