"""A report as a Markdown table and as a plot."""

from pathlib import Path


def markdown(report: dict) -> str:
    """The records as a table under a line on the machine, then runs of whole models and best tiles, if any."""
    where, ceiling = report["machine"], report["ceilings"]
    threads = f", {where['threads']} CPU threads" if where["threads"] and not where["gpu"] else ""
    lines = [
        f"{where['gpu'] or where['processor']}{threads}, torch {where['torch']}, commit {where['commit']}"
        f"{', ' + where['date'][:10] if where['gpu'] else ''}; copy {ceiling['copy_gb_s']:.0f} GB/s, "
        f"read {ceiling['read_gb_s']:.0f} GB/s, "
        f"GEMM {ceiling['gemm_fp32_gflop_s']:.0f} (fp32) and {ceiling['gemm_bf16_gflop_s']:.0f} (bf16) GFLOP/s",
        "",
    ]
    if any(record.get("graph") for record in report["records"]):
        lines += [
            "| case | shape | eager | in a graph | by backend | peers in a graph, and ours over each | of bound |",
            "|---|---|---:|---:|---|---|---:|",
            *(graph_row(record) for record in report["records"]),
        ]
    else:
        lines += ["| case | shape | ours | peers, and ours over each | of bound |", "|---|---|---:|---|---:|"]
        lines += [row(record) for record in report["records"]]
    return "\n".join(lines + runs_table(report.get("runs", [])) + tiles_table(report.get("tiles", [])))


def row(record: dict) -> str:
    if not record["correct"]:
        return f"| `{record['name']}` | {shape_of(record, False)} | - | **{fault(record)}** | - |"
    ours, fraction = record["ours_ms"], f"{100 * record['fraction_of_bound']:.0f}%"
    times = f"{duration(ours)} | {peers_of(record['peers'], ours)}"
    return f"| `{record['name']}` | {shape_of(record)} | {times} | {fraction} |"


def graph_row(record: dict) -> str:
    name = f"| `{record['name']}` |"
    eager, graph = record["ours_ms"], record.get("graph")
    if not record["correct"]:
        others = peers_of((graph or record)["peers"], None)
        return f"{name} {shape_of(record, False)} | - | - | **{fault(record)}** | {others} | - |"
    inside = graph and graph["ours_ms"]
    backends = ", ".join(f"{backend} {duration(ms)}" for backend, ms in (graph or record)["backends"].items())
    # peers that cannot be captured are compared as called from Python
    section, ours = (graph, inside) if inside else (record, eager)
    fraction = f"{100 * section['fraction_of_bound']:.0f}%" if section["fraction_of_bound"] else "-"
    times = f"{duration(eager) if eager else '-'} | {duration(inside) if inside else '-'}"
    note = "" if inside else " (eager)"
    return f"{name} {shape_of(record)} | {times} | {backends} | {peers_of(section['peers'], ours)}{note} | {fraction} |"


def shape_of(record: dict, noted: bool = True) -> str:
    shape = " x ".join(f"{n:,}" for n in record["shape"])
    return f"{shape}; {record['note']}" if noted and record["note"] else shape


def fault(record: dict) -> str:
    """One line on why a record has no times."""
    if record.get("error"):
        return "RAISED: " + record["error"].strip().splitlines()[-1].replace("|", "\\|")
    return record["note"]


def peers_of(peers: dict, ours: float | None) -> str:
    listed = sorted(peers.items(), key=lambda pair: pair[1])
    return ", ".join(f"{name} {duration(ms)}" + (f" ({ms / ours:.3g}x)" if ours else "") for name, ms in listed)


def runs_table(runs: list[dict]) -> list[str]:
    """Runs of whole models: what, and its number with a unit."""
    if not runs:
        return []
    lines = ["", "| run | result | conditions |", "|---|---:|---|"]
    return lines + [f"| {run['name']} | {run['value']:.3g} {run['unit']} | {run['note']} |" for run in runs]


def tiles_table(tiles: list[dict]) -> list[str]:
    """The best tiles of each kernel and layout that was swept."""
    best = {}
    for tile in tiles:
        key = tile["kernel"], tile["class"]
        if key not in best or tile["ms"] < best[key]["ms"]:
            best[key] = tile
    if not best:
        return []
    lines = ["", "| kernel | class | best tiles | time | speed |", "|---|---|---|---:|---:|"]
    return lines + [
        f"| {kernel} | {name} | {' '.join(f'{k}={v}' for k, v in tile['tiles'].items())} | {duration(tile['ms'])} | "
        + (f"{tile['tflop_s']:.0f} TFLOP/s |" if tile["tflop_s"] else "- |")
        for (kernel, name), tile in best.items()
    ]


def line(record: dict) -> str:
    """A record in one line, for who watches a run."""
    if not record["correct"]:
        return f"{record['name']}: {fault(record)}"
    graph = record["graph"] or timeless(record)
    inside = f"{duration(graph['ours_ms'])}" if graph["ours_ms"] else "not captured"
    failed = record["failed"] | graph["failed"]
    return (
        f"{record['name']}: eager {duration(record['ours_ms'])}, graph {inside}; "
        + ", ".join(f"{name} {duration(ms)}" for name, ms in {**graph["backends"], **graph["peers"]}.items())
        + "".join(f"; {name} raised {text.splitlines()[0][:80]}" for name, text in failed.items())
    )


def timeless(record: dict) -> dict:
    return {"ours_ms": None, "backends": {}, "peers": record["peers"], "failed": {}}


def duration(ms: float) -> str:
    """Milliseconds in a readable unit, to three digits."""
    if ms < 1:
        return f"{1000 * ms:.3g} us"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def plot(report: dict, path: Path) -> None:
    """A row a case: the fraction of the bound on the left, the speed-up over the best peer on the right (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # inside a graph where a case was timed so; what has no times is not drawn
    records = [record | (record.get("graph") or {}) for record in report["records"] if record["correct"]]
    records = [record for record in records if record["ours_ms"]][::-1]
    places, where = range(len(records)), report["machine"]
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(10, 1.2 + 0.21 * len(records)), layout="constrained"
    )
    fractions = [record["fraction_of_bound"] for record in records]
    left.barh(places, [min(1.0, f) for f in fractions], color="tab:blue", height=0.7)
    for place, fraction in zip(places, fractions, strict=True):
        # beside the bar, and never across the line at 1
        left.text(1.01 if fraction > 0.9 else fraction + 0.01, place, f"{fraction:.2f}", va="center", fontsize=7)
    left.axvline(1, color="black", linewidth=0.8)
    left.set(yticks=places, xlim=(0, 1.15), ylim=(-0.6, len(records) - 0.4), xlabel="fraction of the machine's bound")
    left.set_yticklabels([record["name"] for record in records], fontsize=7)
    ratios = [record["ratio"] or 1.0 for record in records]
    colors = ["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios]
    right.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colors, height=0.7)
    for place, ratio in zip(places, ratios, strict=True):
        right.text(max(1.0, ratio) * 1.03, place, f"{ratio:.2f}x", va="center", fontsize=7)
    right.axvline(1, color="black", linewidth=0.8)
    right.set(xscale="log", xlim=(0.5, 2 * max(ratios, default=1)), xlabel="speed-up over the best peer")
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if tick < 2 * max(ratios, default=1)]
    right.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    right.minorticks_off()
    threads = "" if where["gpu"] else f", {where['threads']} CPU threads"
    figure.suptitle(f"{where['gpu'] or where['processor']}{threads}, torch {where['torch']}")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
