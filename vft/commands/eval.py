"""``vft eval``: rate and distortion, control and class accuracy, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

from . import options

HELP = "Measure what a model's tokens are worth; optionally a generator too."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="JSON file of the results, replaced if it exists")
    add("--plot", type=Path, metavar="PNG", help="draw the curves, replaced if it exists (needs matplotlib)")
    add(
        "--table", type=Path, nargs="+", default=[], metavar="FILE",
        help="a row for each model and k, .csv or .md, or a .png of them, replaced if they exist",
    )  # fmt: skip
    add("--beside", type=Path, nargs="+", default=[], metavar="JSON", help="results of other models for the table")
    add(
        "--metrics", nargs="+", default=[], metavar="NAME=FILE[,FILE]",
        help="also fvd=, fid=, lpips= or viclip= (of the --video files) with the file of a network, see docs/data.md; "
        "nothing is downloaded",
    )  # fmt: skip
    add("--clips", type=options.at_least(2), default=256, help="held-out procedural clips (default: %(default)s)")
    add("--steps", type=options.at_least(1), help="solver steps (default: the model's)")
    add("--video", type=Path, nargs="*", help="video files (default: the shipped clip)")
    add(
        "--generator",
        help="also measure the loss of this generator ('tiny', 'tiny_text', file, folder) on held-out clips, and how "
        "often its own show the class or the words asked for: trains a classifier first, for less time with fewer "
        "--clips",
    )
    add("--temperature", type=float, default=1.0, help="of generated tokens (default: %(default)g)")
    add("--run", dest="training_runs", type=Path, nargs="+", default=[], help="training runs whose loss to show")


def run(args: argparse.Namespace) -> None:
    """Measures; prints a table, writes JSON and a picture."""
    import torch

    from vft import Generator, demo, evaluate, plots
    from vft.decoding import Sampling
    from vft.files import check_output, replacing
    from vft.train import classifier, state

    Sampling(temperature=args.temperature)
    videos = [demo.CLIP] if args.video is None else args.video
    inputs = [*videos, args.model, args.generator, *args.beside]
    check_output(args.output, inputs)
    if args.plot:
        check_output(args.plot, [*inputs, args.output])
        # a missing matplotlib is an error before the work
        plots.figure(1, 1)
    for path in args.table:
        check_output(path, [*inputs, args.output])
        if path.suffix not in (".csv", ".md", ".png"):
            raise ValueError(f"table must end in .csv, .md or .png, got {str(path)!r}")
        if path.suffix == ".png":
            plots.figure(1, 1)
    others = [evaluate.read_result(path) for path in args.beside]
    networks = [network(text) for text in args.metrics]
    if len({net.kind for net in networks}) < len(networks):
        raise ValueError("--metrics must name each metric once")
    # of video files with captions; the others are of procedural clips
    captions = next((net for net in networks if net.kind == "viclip"), None)
    networks = [net for net in networks if net.kind != "viclip"]
    if captions is not None:
        if not videos or len({path.name for path in videos}) < len(videos):
            raise ValueError("metric viclip needs video files of different names, given with --video")
        for path in videos:
            captions.check(path.name)
    logs = {folder.name: state.read_log(folder) for folder in args.training_runs}
    if len(logs) < len(args.training_runs):
        raise ValueError("folders of training runs must have different names")
    model = options.load_tokenizer(args)
    if model.size is None:
        raise ValueError(f"model {model.name!r} must have a working size")
    if args.generator:
        generator = Generator.from_pretrained(args.generator)
        subject = evaluate.subject(generator)
    steps, keeps = args.steps or model.steps, evaluate.budgets(model.registers)
    result = {
        "model": model.name, "machine": platform.machine(), "torch": torch.__version__, "dtype": "float32",
        "clips": args.clips, "steps": steps, "guidance": str(model.guidance),
        "rate_distortion": {"held-out clips": evaluate.held_out(model, args.clips, keeps, steps=steps)},
        "control": evaluate.control(model, min(args.clips, 64), steps=steps),
    }  # fmt: skip
    if networks:
        result["distances"] = evaluate.distances(model, networks, args.clips, keeps, steps=steps)
    for path in videos:
        result["rate_distortion"][path.name] = evaluate.one_video(model, path, keeps, captions, steps=steps)
    if captions is not None:
        result["captions"] = evaluate.caption_scores(model, captions, videos, result["rate_distortion"])
    if args.generator:
        result["generator_loss"] = round(evaluate.generator_loss(generator, model, args.clips), 4)
        judge, result["judge"] = evaluate.judge(model, args.clips, subject)
        result["temperature"] = args.temperature
        named = subject is classifier.NAMED
        measure = evaluate.word_accuracy if named else evaluate.class_accuracy
        result["word_accuracy" if named else "class_accuracy"] = measure(
            generator, model, judge, args.clips, temperature=args.temperature
        )
    if logs:
        curves = {name: [(line["step"], line["loss"]) for line in log] for name, log in logs.items()}
        result["training_loss"] = {name: evaluate.thinned(curve) for name, curve in curves.items()}
    print(evaluate.table(result))
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    rows = evaluate.comparison([*others, result])
    for path in args.table:
        (plots.comparison if path.suffix == ".png" else evaluate.write_table)(rows, path)
    if args.plot:
        plots.evaluation(result, args.plot)


def network(text: str):
    """The network that ``NAME=FILE[,FILE]`` names."""
    from vft.features import Network

    name, equals, files = text.partition("=")
    if not equals or not files:
        raise ValueError(f"metrics must be NAME=FILE[,FILE], got {text!r}")
    return Network(name, [Path(file) for file in files.split(",")])
