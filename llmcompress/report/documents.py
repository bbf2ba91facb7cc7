"""The two documents, from results.json and the templates."""

import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from llmcompress.engines import VLLM_RANKS
from llmcompress.errors import FormatError
from llmcompress.files import write_text
from llmcompress.report.figures import fenced, markdown, one_line, plus_minus, printable, show
from llmcompress.report.plots import bars, dots, error_plots, loss_curves
from llmcompress.report.rows import comparison, kept_by_reason, predictions, what_was_done

SCHEMA = 1


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
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


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


def front_matter(results: dict[str, Any]) -> Markup:
    """The YAML that the Hub reads from a card; keys without a known value are left out."""
    base = results["base_model"]
    data: dict[str, Any] = {}
    if base["hub_id"]:
        data |= {"base_model": one_line(base["hub_id"]), "base_model_relation": relation(results)}
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
    """Words to find the model by: this project, the library that stores it, the methods, and what lies beside it."""
    storage = ["compressed-tensors"] if results["format"] == "pack-quantized" else []
    methods = [name for layer in results["layers"] for name in layer["method"].split(" + ")]
    lora = ["lora"] if results.get("adapter") else []
    return list(dict.fromkeys(map(one_line, ["llmcompress", *storage, *methods, *lora])))


def hub_datasets(calibration: dict[str, Any] | None) -> list[str]:
    """Names of the calibration data that are datasets on the Hub: `owner/name` at a commit, which no local file has."""
    sources = calibration["sources"] if calibration else []
    return [
        source["data"]
        for source in sources
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source["data"])
        and re.fullmatch(r"[0-9a-f]{40}", source["revision"] or "")
    ]


def relation(results: dict[str, Any]) -> str:
    """What the model is to its base, in the Hub's terms: other dense ones count as fine-tuned."""
    changed = any({"structure", "train", "runtime"} & step.keys() for step in results["recipe"]["steps"])
    return "finetune" if changed and results["format"] == "dense" else "quantized"


def view(results: dict[str, Any], recipe: str) -> dict[str, Any]:
    """What both templates show: results.json itself and the rows and words made from it."""
    loads = {engine["engine"].lower() for engine in results["engines"] if engine["loads"]}
    publish = results["recipe"].get("publish") or {}
    adapter = results.get("adapter")
    rank = adapter["rank"] if adapter else 0
    where = one_line(publish.get("repo_id") or results["name"])
    return {
        "r": results,
        "recipe": recipe,
        "rows": comparison(results),
        "predictions": predictions(results),
        "schemes": what_was_done(results),
        "kept": kept_by_reason(results["kept"]),
        "loads": loads,
        "adapter": adapter,
        "runtime": results.get("runtime"),
        "vllm_rank": next((most for most in VLLM_RANKS if most >= rank), rank),
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
        "curves": loss_curves(results.get("training") or []),
        "parts": bars([part for part in parts if part[2] or part[3]], shared=True),
        "tasks": dots(scores["tasks"], "percent"),
        "perplexity": dots(scores["perplexity"], "fixed"),
        "plan": bars(predictions(results), shared=False),
    }
    template = environment(autoescape=True, finalize=printable).get_template("report.html.jinja")
    return template.render(view(results, recipe), **plots)


@cache
def environment(*, autoescape: bool, finalize: Callable[[Any], Any]) -> Environment:
    """A template environment in which `show` and its kin are the filters and a missing field is an error.

    One for all documents of a kind: compiling the templates takes longer than filling them in.
    """
    env = Environment(
        loader=PackageLoader("llmcompress"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=autoescape, finalize=finalize,
    )  # fmt: skip
    env.filters |= {"show": show, "plus_minus": plus_minus, "px": lambda number: f"{number:.1f}".removesuffix(".0")}
    return env
