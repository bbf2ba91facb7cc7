"""Plots: places of marks on an axis, as shares from 0 to 1; the drawing is in `templates/plots.svg.jinja`."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

from markupsafe import Markup

from llmcompress.report.figures import UNKNOWN, show, spread

POINTS = 60  # of a loss curve
ERRORS = {  # keys of a layer: title, what is divided by what
    "error": ("Relative output error by block", "‖(W − Ŵ)x‖ / ‖Wx‖ on the calibration data"),
    "weight_error": ("Relative weight error by block", "‖W − Ŵ‖ / ‖W‖, for methods that saw no data"),
    "sparsity": ("Share of zeros by block", "weights that are zero / weights, of pruned linears"),
}


@dataclass(frozen=True, slots=True)
class Axis:
    """A stretch of numbers, linear or logarithmic, with round ticks."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False) -> Self:
        """The smallest axis with round ends that holds `values`; one value is in the middle of its axis."""
        numbers = list(values)
        low, high = min(numbers), max(numbers)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10)
        if log:
            return cls(low / 1.1, high * 1.1, log=True)
        step = round_step(high - low)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)

    def at(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high one."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers on the axis, about five of them."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            steps = (1, 2, 5) if len(powers) < 4 else (1,)
            return [m * 10.0**p for p in powers for m in steps if self.low <= m * 10.0**p <= self.high]
        step = round_step(self.high - self.low)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]

    def labels(self, unit: str = "") -> list[dict[str, Any]]:
        """Place and text of every tick. A tick is no result, so it goes without `show`; unit: "percent" or nothing."""
        texts = (f"{100 * tick:g}%" if unit == "percent" else f"{tick:.6g}" for tick in self.ticks())
        return [{"at": self.at(tick), "text": text} for tick, text in zip(self.ticks(), texts, strict=True)]


def round_step(span: float) -> float:
    """The step among 1, 2, 5, 10, 20, ... that cuts `span` into about five."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= span / 5 * 0.999)


def finite(value: float | None) -> TypeGuard[float]:
    """Whether `value` has a place on an axis."""
    return value is not None and math.isfinite(value)


def bars(rows: list[tuple[str, str, float | None, float | None]], *, shared: bool) -> list[dict[str, Any]]:
    """Pairs of bars from (label, unit, first, second); `shared`: one scale for all rows instead of one for each."""
    tops = [max((v for v in pair if finite(v)), default=0) for _, _, *pair in rows]
    if shared:
        tops = [max(tops, default=0)] * len(rows)
    return [
        {"label": label, "bars": [{"share": v / top if finite(v) and top else 0, "text": show(v, unit)} for v in pair]}
        for top, (label, unit, *pair) in zip(tops, rows, strict=True)
    ]


def dots(items: list[dict[str, Any]], unit: str) -> dict[str, Any] | None:
    """Scores of base and compressed with a whisker of one standard error each, on one axis; None without a score."""
    chances = [item.get("chance") for item in items]
    scores = [[item[who] for who in ("base", "compressed")] for item in items]
    ends = [[whisker(score) for score in pair] for pair in scores]
    places = [v for pair in ends for end in pair if end for v in end] + [v for v in chances if v is not None]
    if not any(end for pair in ends for end in pair):
        return None
    axis = Axis.around(places)
    return {
        "ticks": axis.labels(unit),
        "rows": [
            {
                "label": item["name"],
                "chance": None if chance is None else axis.at(chance),
                "points": [
                    {"ends": None if end is None else [axis.at(v) for v in end], "text": spread(score, unit)}
                    for score, end in zip(pair, pair_ends, strict=True)
                ],
            }
            for item, chance, pair, pair_ends in zip(items, chances, scores, ends, strict=True)
        ],
    }


def whisker(score: dict[str, Any] | None) -> tuple[float, float, float] | None:
    """value - stderr, value, value + stderr; None for a score that has no place on an axis."""
    if score is None or not finite(score["value"]):
        return None
    stderr = score["stderr"] if finite(score["stderr"]) else 0.0
    return score["value"] - stderr, score["value"], score["value"] + stderr


def kind_of(name: str) -> str:
    """What a linear is within its block: its path after the block's number, numbers of experts left out."""
    path = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"\.\d+(?=\.)", "", path)


def error_plots(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plots of output errors, of weight errors where there are no others, and of zeros; each if there are any."""
    plots = []
    for key, (title, formula) in ERRORS.items():
        chosen = [x for x in layers if finite(x.get(key)) and (key != "weight_error" or x["error"] is None)]
        if chosen:
            plots.append({"title": title, "formula": formula, **error_lines(chosen, key)})
    return plots


def error_lines(layers: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Axes, one series per kind of linear, and the same numbers as a table with a row per block."""
    values = [layer[key] for layer in layers]
    log = min(values) > 0 and max(values) > 20 * min(values)
    y = Axis.around(values if log else [0.0, *values], log=log)
    blocks = sorted({layer["block"] for layer in layers})
    x = Axis(blocks[0] - 0.5, blocks[-1] + 0.5)
    kinds = short_names(dict.fromkeys(kind_of(layer["name"]) for layer in layers))
    series: dict[str, list[dict[str, Any]]] = {label: [] for label in kinds.values()}
    table: dict[int, dict[str, list[Markup]]] = {block: {} for block in blocks}
    for layer in layers:
        label, text = kinds[kind_of(layer["name"])], show(layer[key], "significant")
        series[label].append({"x": x.at(layer["block"]), "y": y.at(layer[key]), "text": f"{layer['name']}: {text}"})
        table[layer["block"]].setdefault(label, []).append(text)
    every = max(1, round(round_step(len(blocks) / 2)))
    x_ticks = [{"at": x.at(block), "text": str(block)} for block in blocks if block % every == 0]
    rows = [
        (show(block, "count"), [Markup(", ").join(cells.get(label, [UNKNOWN])) for label in series])
        for block, cells in table.items()
    ]
    return {"x_label": "block", "x_ticks": x_ticks, "y_ticks": y.labels(), "series": series, "rows": rows}


def loss_curves(trainings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The loss of every train step over its optimizer steps, at most POINTS of them."""
    plots = []
    for training in trainings:
        losses = training["losses"]
        y, x = Axis.around([0.0, *losses], log=False), Axis(1, max(2, len(losses)))
        every = -(-len(losses) // POINTS)
        points = [
            {"x": x.at(step), "y": y.at(loss), "text": f"step {step}: {show(loss, 'significant')}"}
            for step, loss in enumerate(losses, 1)
            if step % every == 0 or step in (1, len(losses))
        ]
        ticks = sorted({1, *(round(len(losses) * share) for share in (0.25, 0.5, 0.75, 1))} - {0})
        words = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in training["loss"].items())
        first, last = (show(losses[i], "fixed") for i in (0, -1))
        plots.append(
            {
                "title": f"Loss of training ({training['name']})",
                "formula": f"{words.replace('_', ' ')}: {first} in the first step, {last} in the last",
                "x_label": "step",
                "x_ticks": [{"at": x.at(step), "text": str(step)} for step in ticks],
                "y_ticks": y.labels(),
                "series": {"loss": points},
                "rows": [],
            }
        )
    return plots


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """path -> its last part, or the whole path where two paths end alike."""
    paths = list(paths)
    ends = [path.rsplit(".", 1)[-1] for path in paths]
    return {path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)}
