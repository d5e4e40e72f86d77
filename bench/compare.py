"""Which cases have become slower than in an earlier report, beyond noise.

A case has regressed when its result is now wrong, or when all of this holds: its median is at least MARGIN slower; its
lower quartile lies above the earlier upper quartile; and both still do after the drift of the machine is taken out,
which is what the peers of the case, timed in the same turns, have lost.
"""

import statistics

# slower by less than this is never a regression
MARGIN = 1.1
# reports that differ in one of these are not compared
SAME = ("device", "processor", "gpu", "threads")


def key(record: dict) -> tuple:
    return record["name"], record["device"], record["dtype"], tuple(record["shape"])


def check_comparable(old: dict, new: dict) -> None:
    """Raises ValueError where the reports come from different machines, or the earlier one does not hold quartiles."""
    for name in SAME:
        if old["machine"][name] != new["machine"][name]:
            raise ValueError(
                f"{name} must be the same to compare, got {old['machine'][name]} and {new['machine'][name]}"
            )
    if any(record["correct"] and not record.get("quartiles") for record in old["records"]):
        raise ValueError("the earlier report must hold the quartiles of its cases: measure it again")


def compare(old: dict, new: dict) -> tuple[list[str], int]:
    """(a line a case that both reports hold, number of regressions)."""
    check_comparable(old, new)
    before = {key(record): record for record in old["records"]}
    lines, regressions = [], 0
    for record in new["records"]:
        earlier = before.get(key(record))
        if earlier is None or not earlier["correct"]:
            lines.append(f"{record['name']}: not in the earlier report")
            continue
        if not record["correct"]:
            lines.append(f"{record['name']}: REGRESSION, {record['note']}")
            regressions += 1
            continue
        for way, before_it, now_it in ways(earlier, record):
            slower = regressed(before_it, now_it)
            regressions += slower
            was, now = before_it["ours_ms"], now_it["ours_ms"]
            lines.append(
                f"{record['name']}{way}: {'REGRESSION, ' if slower else ''}{was:.3g} -> {now:.3g} ms "
                f"({now / was:.2f}x the time; its peers {drift(before_it, now_it):.2f}x)"
            )
    return lines, regressions


def ways(old: dict, new: dict) -> list[tuple[str, dict, dict]]:
    """The ways to call that both records have times of: from Python, and inside a CUDA graph."""
    found = [("", old, new), (" in a graph", old.get("graph"), new.get("graph"))]
    return [(way, a, b) for way, a, b in found if a and b and a["ours_ms"] and b["ours_ms"]]


def drift(old: dict, new: dict) -> float:
    """Times that the peers of a case take now what they took before, the median; 1 without peers."""
    shared = old["peers"].keys() & new["peers"].keys()
    return statistics.median(new["peers"][name] / old["peers"][name] for name in shared) if shared else 1.0


def regressed(old: dict, new: dict) -> bool:
    # peers that have become faster say nothing against ours
    lost = max(1.0, drift(old, new))
    slower = new["ours_ms"] / lost > MARGIN * old["ours_ms"]
    return slower and new["quartiles"]["ours"][0] / lost > old["quartiles"]["ours"][1]
