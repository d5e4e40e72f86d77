"""A report as a Markdown table and as a plot."""

from pathlib import Path


def markdown(report: dict) -> str:
    """The records as a table, under a line on the machine."""
    where, ceiling = report["machine"], report["ceilings"]
    lines = [
        f"{where['gpu'] or where['processor']}, {where['threads']} CPU threads, torch {where['torch']}, "
        f"commit {where['commit']}; copy {ceiling['copy_gb_s']:.0f} GB/s, read {ceiling['read_gb_s']:.0f} GB/s, "
        f"GEMM {ceiling['gemm_fp32_gflop_s']:.0f} (fp32) and {ceiling['gemm_bf16_gflop_s']:.0f} (bf16) GFLOP/s",
        "",
        "| case | shape | ours | peers, and ours over each | of bound |",
        "|---|---|---:|---|---:|",
    ]
    return "\n".join(lines + [row(record) for record in report["records"]])


def row(record: dict) -> str:
    shape = " x ".join(f"{n:,}" for n in record["shape"])
    if not record["correct"]:
        return f"| `{record['name']}` | {shape} | - | **{record['note']}** | - |"
    shape += f"; {record['note']}" if record["note"] else ""
    ours = record["ours_ms"]
    peers = sorted(record["peers"].items(), key=lambda pair: pair[1])
    listed = ", ".join(f"{name} {duration(ms)} ({ms / ours:.3g}x)" for name, ms in peers)
    return f"| `{record['name']}` | {shape} | {duration(ours)} | {listed} | {100 * record['fraction_of_bound']:.0f}% |"


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

    records = [record for record in report["records"] if record["correct"]][::-1]
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
    figure.suptitle(f"{where['gpu'] or where['processor']}, {where['threads']} CPU threads, torch {where['torch']}")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
