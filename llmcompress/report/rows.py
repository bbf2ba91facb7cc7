"""Rows of the tables that card, page and terminal share."""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from llmcompress.report.figures import UNKNOWN, one_line, plus_minus, show, spread

QUANTITIES = {  # keys of plan.predicted and plan.measured: name, unit
    "peak_host_bytes": ("peak host memory", "bytes"),
    "peak_device_bytes": ("peak device memory", "bytes"),
    "disk_bytes": ("disk needed", "bytes"),
    "output_bytes": ("size of the result", "bytes"),
    "seconds": ("time", "seconds"),
}
KINDS = ("structure", "train", "runtime")  # of steps that are not methods
DENOMINATORS = {  # keys of sparsity: what the zeros are a share of
    "of_pruned_linears": "the pruned linears",
    "of_decoder_linears": "all linears of the decoder blocks",
    "of_parameters": "all parameters",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of before and after. `name` and `detail` are plain strings, the rest went through `show`."""

    name: str
    detail: str
    before: Markup
    after: Markup
    change: Markup


def comparison(results: dict[str, Any]) -> list[Row]:
    """Size and every score, before and after, in the order of the card."""
    size, scores = results["size"], results["scores"]
    change = Markup(f"× {show(size['ratio'], 'ratio')}")
    before, after = show(size["before_bytes"], "bytes"), show(size["after_bytes"], "bytes")
    rows = [Row("size of the weights", "", before, after, change)]
    if sparsity := results.get("sparsity"):
        rows += [
            Row(f"zeros, of {words}", "", UNKNOWN, show(sparsity[key], "percent"), UNKNOWN)
            for key, words in DENOMINATORS.items()
        ]
    if runtime := results.get("runtime"):
        rows += runtime_rows(runtime)
    if scores is None:
        return rows
    rows += [perplexity_row(item) for item in scores["perplexity"]]
    rows += divergence_rows(scores["divergence"]) if scores["divergence"] else []
    return rows + [task_row(item) for item in scores["tasks"]]


def runtime_rows(runtime: dict[str, Any]) -> list[Row]:
    """What a token of decoding leaves out and reads."""
    reads = runtime["read_bytes"]
    change = Markup(f"× {show(reads['after'] / reads['before'], 'ratio')}")
    detail = f"each token but the first {show(runtime['dense_tokens'], 'count')}, by llmcompress.load alone"
    share = show(runtime["sparsity"], "percent")
    return [
        Row(f"weights left out at run time, of {runtime['linears']} linears", detail, UNKNOWN, share, UNKNOWN),
        Row("weights read for a token", detail, show(reads["before"], "bytes"), show(reads["after"], "bytes"), change),
    ]


def perplexity_row(item: dict[str, Any]) -> Row:
    """Perplexity on one text; its change is a ratio."""
    detail = f"{show(item['windows'], 'count')} windows of {show(item['length'], 'count')} tokens, lower is better"
    ratio = plus_minus(item["ratio"], item.get("ratio_stderr"), "ratio")
    change = UNKNOWN if item["ratio"] is None else Markup(f"× {ratio}")
    before, after = spread(item["base"], "fixed"), spread(item["compressed"], "fixed")
    return Row(f"perplexity, {item['name']}", detail, before, after, change)


def divergence_rows(item: dict[str, Any]) -> list[Row]:
    """How far the compressed model is from the base on one text; neither has a value before."""
    detail = f"{show(item['tokens'], 'count')} tokens"
    kl = plus_minus(item["kl"], item["kl_stderr"], "significant")
    same = show(item["top1_agreement"], "percent")
    return [
        Row(f"KL divergence from the base, {item['name']}", f"nats per token, {detail}", UNKNOWN, kl, UNKNOWN),
        Row(f"same most likely token as the base, {item['name']}", detail, UNKNOWN, same, UNKNOWN),
    ]


def task_row(item: dict[str, Any]) -> Row:
    """Accuracy on one task; its change is a difference and, where the base is above chance, a recovery."""
    chance = f", chance {show(item['chance'], 'percent')}" if item["chance"] is not None else ""
    detail = f"{item['metric']}, {show(item['items'], 'count')} items, {show(item['fewshot'], 'count')}-shot{chance}"
    change = UNKNOWN
    if item["difference"] is not None:
        change = Markup(f"{plus_minus(item['difference'], item['difference_stderr'], 'points')} points")
    if item["recovery"] is not None:
        change += Markup(f", recovery {plus_minus(item['recovery'], item['recovery_stderr'], 'percent')}")
    return Row(item["name"], detail, spread(item["base"], "percent"), spread(item["compressed"], "percent"), change)


def predictions(results: dict[str, Any]) -> list[tuple[str, str, float | None, float | None]]:
    """name, unit, predicted and measured of every quantity that the run used at all."""
    predicted, measured = results["plan"]["predicted"], results["plan"]["measured"]
    pairs = [(*QUANTITIES[key], predicted.get(key), measured.get(key)) for key in QUANTITIES]
    return [pair for pair in pairs if pair[2] or pair[3]]


def summary_table(results: dict[str, Any]) -> Table:
    """Size, scores and what the run needed, for the end of a run on the terminal."""
    table = Table("", "before", "after", "change", title=Text(one_line(results["name"])))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in comparison(results):
        table.add_row(Text(one_line(row.name)), row.before, row.after, row.change.replace(", ", "\n"))
    table.add_section()
    for name, unit, predicted, measured in predictions(results):
        table.add_row(Text(name), "", Text(show(measured, unit)), Text(f"predicted {show(predicted, unit)}"))
    return table


def schemes(layers: list[dict[str, Any]]) -> str:
    """What was done to the linears, in words, each distinct way once."""

    def words(layer: dict[str, Any]) -> str:
        name = str(layer["method"])
        if layer.get("pattern"):
            name += f", pattern {layer['pattern']}"
        if layer.get("bits") is None:  # a method without a grid
            return name
        group = layer["group_size"]
        shape = f"groups of {show(group, 'count')}" if isinstance(group, int) and group > 0 else "one group per row"
        kind = "symmetric" if layer["symmetric"] else "asymmetric"
        return f"{name} to {show(layer['bits'], 'count')} bits ({kind}, {shape})"

    return " and ".join(dict.fromkeys(map(words, layers)))


def what_was_done(results: dict[str, Any]) -> str:
    """All stages in words, the last with its details; LoRA comes after the linears' methods, which it leaves alone."""
    stages = [one_line(stage["name"]) for stage in results.get("stages") or []][1:-1]
    steps = [next((step[k] for k in KINDS if k in step), None) for step in results["recipe"]["steps"]]
    last = schemes(results["layers"]) or one_line(str(steps[-1] or ""))
    if adapter := results.get("adapter"):
        stages, last = stages[:-1], f"{last}, then {steps[-1]} by LoRA of rank {show(adapter['rank'], 'count')}"
    return ", then ".join([*stages, last] if last else stages)


def kept_by_reason(kept: list[dict[str, str]]) -> dict[str, str]:
    """reason -> the names of the linears left alone for it."""
    reasons = dict.fromkeys(item["reason"] for item in kept)
    return {reason: ", ".join(item["name"] for item in kept if item["reason"] == reason) for reason in reasons}
