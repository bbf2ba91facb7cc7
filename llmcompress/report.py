"""The model card and the report: `results.json`, made readable.

A run measures, writes what it measured to `results.json`, and is done; this module only shows it. `README.md` is a
model card for the Hub, `report.html` one page without scripts or requests to anywhere. Both can be made again from
the folder at any time, and give the same bytes.

Two rules keep them honest, and the template engine enforces both:

- A number reaches a template only as text made by `show`, which converts units and rounds but computes nothing else;
  a template that prints a bare number fails. So whatever is read here stands in `results.json`. The one exception is
  the scale of a plot (its tick labels and the places of its marks), which is drawn, not measured.
- Strings come from users (names of models, data and files) and are escaped on the way out, as HTML on the page and as
  Markdown on the card. Only `Markup`, made here, passes untouched.

Markup lives in `templates/`; this file prepares rows of text, and for the plots shares of an axis from 0 to 1.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeGuard

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined, UndefinedError
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from llmcompress.errors import FormatError

SCHEMA = 1
UNKNOWN = Markup("–")
QUANTITIES = {  # keys of plan.predicted and plan.measured: name, unit
    "peak_host_bytes": ("peak host memory", "bytes"),
    "peak_device_bytes": ("peak device memory", "bytes"),
    "disk_bytes": ("disk needed", "bytes"),
    "output_bytes": ("size of the result", "bytes"),
    "seconds": ("time", "seconds"),
}
ERRORS = {  # keys of a layer: title, what is divided by what
    "error": ("Relative output error by block", "‖(W − Ŵ)x‖ / ‖Wx‖ on the calibration data"),
    "weight_error": ("Relative weight error by block", "‖W − Ŵ‖ / ‖W‖, for methods that saw no data"),
}


def write_report(folder: Path) -> list[Path]:
    """Write README.md and report.html of a finished run from its results.json and recipe.yaml.

    Each file is replaced whole or not at all. Returns their paths.
    Raises FormatError if results.json or recipe.yaml is missing or not what this version writes.
    """
    results, recipe = read_results(folder), read_text(folder / "recipe.yaml")
    try:
        texts = {"README.md": model_card(results, recipe), "report.html": report_page(results, recipe)}
    except (KeyError, TypeError, UndefinedError) as exc:
        raise FormatError(
            f"{folder / 'results.json'}: cannot be shown ({exc!r}); expected the fields of schema {SCHEMA}; "
            "run the recipe again"
        ) from exc
    return [write_atomically(folder / name, text) for name, text in texts.items()]


def read_results(folder: Path) -> dict[str, Any]:
    """The content of results.json. Raises FormatError if it is missing, not JSON or of another schema."""
    path = folder / "results.json"
    try:
        results: Any = json.loads(read_text(path))
    except json.JSONDecodeError as exc:
        raise FormatError(f"{path}: not valid JSON ({exc}); run the recipe again") from exc
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else results
        raise FormatError(
            f"{path}: expected schema {SCHEMA}, found {found!r}; use the version that wrote it, or run the recipe again"
        )
    return results


def read_text(path: Path) -> str:
    """The text of `path`. Raises FormatError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise FormatError(f"{path}: cannot be read ({exc}); expected the folder of a finished run") from exc


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` beside `path`, then rename it over, so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# Numbers and strings


def show(value: float | None, unit: str) -> Markup:
    """A number of results.json as text; the only way for a number to reach a reader.

    unit: "bytes", "seconds", "count" (whole), "percent" and "points" (from a share), "fixed" (2 decimals), "ratio"
    (3 decimals) or "significant" (3 digits). None is shown as a dash.
    """
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return Markup("not finite")
    if unit == "bytes":
        return show_bytes(value)
    if unit == "seconds":
        return show_seconds(value)
    scale, form = {
        "count": (1, ",.0f"),
        "percent": (100, ".1f"),
        "points": (100, "+.1f"),
        "fixed": (1, ".2f"),
        "ratio": (1, ".3f"),
        "significant": (1, ".3g"),
    }[unit]
    return Markup(f"{scale * value:{form}}{'%' if unit == 'percent' else ''}")


def show_bytes(value: float) -> Markup:
    """Bytes in the largest binary unit that leaves at least 1."""
    for power, name, form in ((30, "GiB", ".2f"), (20, "MiB", ".1f"), (10, "KiB", ".1f")):
        if abs(value) >= 2**power:
            return Markup(f"{value / 2**power:{form}} {name}")
    return Markup(f"{value:.0f} B")


def show_seconds(value: float) -> Markup:
    """Seconds as a person would say them."""
    if value < 59.95:
        return Markup(f"{value:.1f} s")
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return Markup(f"{minutes} min {seconds:02d} s")
    hours, minutes = divmod(round(value / 60), 60)
    return Markup(f"{hours} h {minutes:02d} min")


def spread(score: dict[str, Any] | None, unit: str) -> Markup:
    """A score {"value", "stderr"} with its standard error; a dash if there is none."""
    return UNKNOWN if score is None else plus_minus(score["value"], score["stderr"], unit)


def plus_minus(value: float | None, stderr: float | None, unit: str) -> Markup:
    """`value ± stderr`; the value alone if its error is unknown."""
    if value is None or stderr is None:
        return show(value, unit)
    return Markup(f"{show(value, unit)} ± {show(stderr, unit).removeprefix('+')}")


def one_line(text: object) -> str:
    """`text` with every run of white space and control characters as one space."""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(text)).strip()


def markdown(value: object) -> str:
    """What the card prints for an expression: Markup as it is, any other string so that Markdown shows it literally."""
    text = printable(value)
    if isinstance(text, Markup | Undefined):
        return str(text)
    # An underscore inside a word is no emphasis; leaving it keeps names like arc_easy readable in the source.
    escaped = re.sub(r"[\\`*\[\]<>&|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))
    return re.sub(r"^(\d*)(?=[+=-]|(?<=\d)[.)](?:\s|$))", r"\1\\", escaped)  # no heading, no item of a list


def printable(value: object) -> str | Undefined:
    """Refuse to print what is not text, so that no number gets past `show`. Raises TypeError."""
    if not isinstance(value, str | Undefined):
        raise TypeError(f"a template prints {value!r} without a unit")
    return value


def fenced(text: str, language: str) -> Markup:
    """A Markdown code block; its fence is longer than any run of backticks in `text`."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


# Rows of tables


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
    if scores is None:
        return rows
    rows += [perplexity_row(item) for item in scores["perplexity"]]
    rows += divergence_rows(scores["divergence"]) if scores["divergence"] else []
    return rows + [task_row(item) for item in scores["tasks"]]


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
        if layer.get("bits") is None:  # a method without a grid
            return str(layer["method"])
        group = layer["group_size"]
        shape = f"groups of {show(group, 'count')}" if isinstance(group, int) and group > 0 else "one group per row"
        kind = "symmetric" if layer["symmetric"] else "asymmetric"
        return f"{layer['method']} to {show(layer['bits'], 'count')} bits ({kind}, {shape})"

    return " and ".join(dict.fromkeys(map(words, layers)))


def kept_by_reason(kept: list[dict[str, str]]) -> dict[str, str]:
    """reason -> the names of the linears left alone for it."""
    reasons = dict.fromkeys(item["reason"] for item in kept)
    return {reason: ", ".join(item["name"] for item in kept if item["reason"] == reason) for reason in reasons}


# Plots: places on an axis, as shares from 0 to 1


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
    """One plot for linears with an output error and one for those with a weight error only, each if there are any."""
    plots = []
    for key, (title, formula) in ERRORS.items():
        chosen = [x for x in layers if finite(x[key]) and (key == "error" or x["error"] is None)]
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
    return {"x_ticks": x_ticks, "y_ticks": y.labels(), "series": series, "rows": rows}


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """path -> its last part, or the whole path where two paths end alike."""
    paths = list(paths)
    ends = [path.rsplit(".", 1)[-1] for path in paths]
    return {path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)}


# The two documents


def front_matter(results: dict[str, Any]) -> Markup:
    """The YAML that the Hub reads from a card; keys without a known value are left out."""
    base = results["base_model"]
    data: dict[str, Any] = {}
    if base["hub_id"]:
        data |= {"base_model": one_line(base["hub_id"]), "base_model_relation": "quantized"}
    if base["license"]:
        name = one_line(base["license"])
        # The Hub refuses a card whose license is none of its identifiers, unless it is "other" with a name.
        known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name)
        data |= {"license": name} if known else {"license": "other", "license_name": name}
    data |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags(results)}
    if datasets := hub_datasets(results["calibration"]):
        data["datasets"] = datasets
    return Markup(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def tags(results: dict[str, Any]) -> list[str]:
    """Words to find the model by: this project, the library that stores it and the methods."""
    storage = ["compressed-tensors"] if results["format"] == "pack-quantized" else []
    methods = [layer["method"] for layer in results["layers"]]
    return list(dict.fromkeys(map(one_line, ["llmcompress", *storage, *methods])))


def hub_datasets(calibration: dict[str, Any] | None) -> list[str]:
    """Names of the calibration data that are datasets on the Hub: `owner/name` at a commit, which no local file has."""
    sources = calibration["sources"] if calibration else []
    return [
        source["data"]
        for source in sources
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source["data"])
        and re.fullmatch(r"[0-9a-f]{40}", source["revision"] or "")
    ]


def view(results: dict[str, Any], recipe: str) -> dict[str, Any]:
    """What both templates show: results.json itself and the rows and words made from it."""
    loads = {engine["engine"].lower() for engine in results["engines"] if engine["loads"]}
    publish = results["recipe"].get("publish") or {}
    where = one_line(publish.get("repo_id") or results["name"])
    return {
        "r": results,
        "recipe": recipe,
        "rows": comparison(results),
        "predictions": predictions(results),
        "schemes": schemes(results["layers"]),
        "kept": kept_by_reason(results["kept"]),
        "loads": loads,
        "python_name": Markup(json.dumps(where)),
        "shell_name": Markup(shlex.quote(where)),
    }


def model_card(results: dict[str, Any], recipe: str) -> str:
    """The text of README.md."""
    template = environment(autoescape=False, finalize=markdown).get_template("card.md.jinja")
    blocks = {"front_matter": front_matter(results), "recipe_block": fenced(recipe, "yaml")}
    return template.render(view(results, recipe), **blocks)


def report_page(results: dict[str, Any], recipe: str) -> str:
    """The text of report.html."""
    scores = results["scores"] or {"perplexity": [], "tasks": []}
    parts = [(part["part"], "bytes", part["before_bytes"], part["after_bytes"]) for part in results["size"]["parts"]]
    plots = {
        "errors": error_plots(results["layers"]),
        "parts": bars([part for part in parts if part[2] or part[3]], shared=True),
        "tasks": dots(scores["tasks"], "percent"),
        "perplexity": dots(scores["perplexity"], "fixed"),
        "plan": bars(predictions(results), shared=False),
    }
    template = environment(autoescape=True, finalize=printable).get_template("report.html.jinja")
    return template.render(view(results, recipe), **plots)


def environment(**options: Any) -> Environment:
    """A template environment in which `show` and its kin are the filters and a missing field is an error."""
    env = Environment(
        loader=PackageLoader("llmcompress"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )
    env.filters |= {"show": show, "plus_minus": plus_minus, "px": lambda number: f"{number:.1f}".removesuffix(".0")}
    return env
