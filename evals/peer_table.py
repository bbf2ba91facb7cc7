"""What is recorded of each run of a comparison, and the table of all."""

import statistics
from dataclasses import dataclass
from typing import Any

from provenance import in_words

SIDES = ("peer", "ours")


@dataclass
class Run:
    """One process of one side."""

    row: str
    side: str
    status: str  # "done", "stopped after 3000 s" or "failed: ..."
    seconds: float  # whole process, the proof of loading taken out
    load_average: float  # 1-minute load of the machine just before the start
    work_seconds: float | None = None  # without interpreter start and imports
    proof_seconds: float | None = None  # ours only; not in `seconds`
    peak_bytes: int | None = None
    folder_bytes: int | None = None
    perplexity: float | None = None  # of the first run of a row and side


TIME_LIMITS = {"gptq": 0.6, "sparsegpt": 0.6, "wanda": 0.6, "awq": 0.2}  # of the peer's time
MEMORY_LIMIT = 1.2 * 2**30


def middle(runs: list[Run], field: str) -> float | None:
    """Median of a field over the finished runs, or None where nothing was measured."""
    values = [getattr(run, field) for run in runs if getattr(run, field) is not None]
    return statistics.median(values) if values else None


def table(report: dict[str, Any], runs: list[Run]) -> str:
    """The Markdown table with everything needed to read it."""
    here, versions = report["machine"], report["versions"]
    dense = "" if report["dense"] is None else f" (dense {report['dense']:.2f})"
    lines = [
        f"{in_words(here)}; {report['dtype']} model; medians of up to {report['repeats']} alternating runs.",
        *(f"{side}: {', '.join(f'{name} {number}' for name, number in versions[side].items())}." for side in SIDES),
        "",
        f"| row | side | perplexity{dense} | compress | work | peak memory | folder | time, ours / peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in dict.fromkeys(run.row for run in runs):
        by_side = {side: [run for run in runs if (run.row, run.side) == (row, side)] for side in SIDES}
        samples = f" ({report['samples'][row]} samples)"
        for side, mine in by_side.items():
            ratio = time_ratio(by_side) if side == SIDES[-1] else ""
            lines.append(f"| {row}{samples} | {side} | {' | '.join(cells(mine))} | {ratio} |")
    lines += [
        "",
        "peer: llm-compressor; gptq rows with its default actorder (static); in awq rows its `pin_memory` "
        "call, which needs an accelerator, is replaced by the identity, and both sides see the same few samples.",
    ]
    proofs = [run.proof_seconds for run in runs if run.proof_seconds is not None]
    if proofs:
        lines.append(f"ours: the proof of loading (median {statistics.median(proofs):.0f} s) is not in the times.")
    loads = [run.load_average for run in runs]
    if loads:
        lines.append(f"Load average of the machine before the runs: {min(loads):.1f} to {max(loads):.1f}.")
    return "\n".join(lines)


def cells(runs: list[Run]) -> list[str]:
    """Perplexity, compress, work, memory and size of one row and side."""
    stopped = next((run.status for run in runs if run.status != "done"), None)
    done = [run for run in runs if run.status == "done"]
    if not done:
        return ["-", (stopped or "-").split(",")[0], "-", "-", "-"]
    shown = [
        (middle(done, name), unit)
        for name, unit in (("perplexity", "{:.2f}"), ("seconds", "{:.1f} s"), ("work_seconds", "{:.1f} s"))
    ]
    sizes = [(middle(done, "peak_bytes"), 2**30, "{:.2f} GiB"), (middle(done, "folder_bytes"), 10**6, "{:.0f} MB")]
    return ["-" if value is None else text.format(value) for value, text in shown] + [
        "-" if value is None else text.format(value / by) for value, by, text in sizes
    ]


def time_ratio(by_side: dict[str, list[Run]]) -> str:
    """Ours over the peer's; "below" where the peer was stopped, since its time is then a lower bound."""
    ours = middle([run for run in by_side.get("ours", []) if run.status == "done"], "seconds")
    peer = [run for run in by_side.get("peer", []) if not run.status.startswith("failed")]
    if ours is None or not peer:
        return "-"
    bound = "" if peer[-1].status == "done" else "below "
    return f"{bound}{ours / statistics.median(run.seconds for run in peer):.2f}"


def misses(runs: list[Run]) -> list[str]:
    """What ours does not keep: see the limits above."""
    found = []
    for row in dict.fromkeys(run.row for run in runs):
        ours, peer = ([run for run in runs if (run.row, run.side) == (row, side)] for side in ("ours", "peer"))
        method = row.split("-")[0]
        scores = [middle(side, "perplexity") for side in (ours, peer)]
        if scores[0] is not None and scores[1] is not None and scores[0] > scores[1]:
            found.append(f"{row}: perplexity {scores[0]:.2f}, the peer's is {scores[1]:.2f}")
        times = [middle(side, "seconds") for side in (ours, peer)]
        if times[0] and times[1] and method in TIME_LIMITS and times[0] > TIME_LIMITS[method] * times[1]:
            found.append(f"{row}: {times[0] / times[1]:.2f} of the peer's time, {TIME_LIMITS[method]} is the limit")
        if ours and all(run.status != "done" for run in ours):
            found.append(f"{row}: ours {ours[-1].status}")
        peak = middle(ours, "peak_bytes")
        if peak and peak > MEMORY_LIMIT:
            found.append(f"{row}: {peak / 2**30:.2f} GiB")
    return found
