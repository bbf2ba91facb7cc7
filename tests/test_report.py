"""The card and the page show what results.json says, nothing else, whatever strings it holds."""

import copy
import functools
import html
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from llmcompress.errors import FormatError
from llmcompress.report import summary_table, write_report
from llmcompress.report.documents import environment, model_card, report_page
from llmcompress.report.figures import markdown, printable, show
from llmcompress.report.plots import Axis

RECIPE = """\
model: smollm2-135m
calibration: {data: HuggingFaceH4/ultrachat_200k, samples: 128, length: 512}   # packed
steps:
  - method: gptq
    bits: 4
    group_size: 64
output: {format: pack-quantized}
"""
LINEARS = {  # path in a block: rows, columns, typical relative output error
    "self_attn.q_proj": (576, 576, 0.09),
    "self_attn.k_proj": (192, 576, 0.07),
    "self_attn.v_proj": (192, 576, 0.15),
    "self_attn.o_proj": (576, 576, 0.17),
    "mlp.gate_proj": (1536, 576, 0.12),
    "mlp.up_proj": (1536, 576, 0.14),
    "mlp.down_proj": (576, 1536, 0.19),
}
TASKS = {
    "arc_easy": (0.25, 0.605),
    "piqa": (0.5, 0.678),
    "hellaswag": (0.25, 0.421),
    "winogrande": (0.5, 0.523),
    "lambada": (0.0, 0.398),
}


def sample_layers(blocks: int, rng: random.Random) -> list[dict[str, Any]]:
    """The linears of `blocks` decoder blocks, with errors as GPTQ leaves them."""
    return [
        {
            "name": f"model.layers.{block}.{path}",
            "block": block,
            "method": "gptq",
            "bits": 4,
            "group_size": 64,
            "symmetric": True,
            "before_bytes": rows * columns * 2,
            "after_bytes": rows * columns // 2 + rows * columns // 64 * 2,
            "error": typical * rng.uniform(0.8, 1.25) * (0.6 + 0.5 * math.exp(-block / 4)),
            "weight_error": rng.uniform(0.08, 0.12),
        }
        for block in range(blocks)
        for path, (rows, columns, typical) in LINEARS.items()
    ]


def sample_scores(rng: random.Random) -> dict[str, Any]:
    """Scores of the suite `quick` on a small model and its int4 form."""

    def task(name: str, chance: float, base: float) -> dict[str, Any]:
        lost = rng.uniform(0.004, 0.03)
        return {
            "name": name,
            "task": f"{name}_offline",
            "metric": "acc",
            "items": 203,
            "fewshot": 0,
            "chance": chance,
            "base": {"value": base, "stderr": 0.0343},
            "compressed": {"value": base - lost, "stderr": 0.0346},
            "difference": -lost,
            "difference_stderr": 0.0117,
            "recovery": 1 - lost / base,
            "recovery_stderr": 0.0191,
        }

    return {
        "suite": {"name": "quick", "version": 1},
        "dtype": "float32",
        "task_dtype": "bfloat16",
        "seconds": 402.7,
        "perplexity": [
            {
                "name": "boolq-heldout",
                "length": 512,
                "windows": 48,
                "tokens": 24528,
                "ratio": 1.0832,
                "ratio_stderr": 0.0063,
                "base": {"value": 21.364, "nll": 3.0617, "stderr": 0.4127},
                "compressed": {"value": 23.1415, "nll": 3.1416, "stderr": 0.4581},
            }
        ],
        "divergence": {
            "kl": 0.08312,
            "kl_stderr": 0.00147,
            "top1_agreement": 0.8613,
            "tokens": 24528,
            "name": "boolq-heldout",
        },
        "tasks": [task(name, *values) for name, values in TASKS.items()],
    }


def sample_results(blocks: int = 30, seed: int = 0) -> dict[str, Any]:
    """A results.json as a run of w4a16-gptq on a small Llama leaves it."""
    rng = random.Random(seed)
    return {
        "schema": 1,
        "created": "2026-11-22T03:00:00Z",
        "name": "smollm2-135m-w4a16-gptq",
        "base_model": {
            "id": "smollm2-135m",
            "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": None,
            "license": "apache-2.0",
            "model_type": "llama",
            "parameters": 134515008,
        },
        "recipe": yaml.safe_load(RECIPE),
        "format": "pack-quantized",
        "calibration": {
            "sources": [
                {
                    "data": "HuggingFaceH4/ultrachat_200k",
                    "revision": "8049631c405ae6576f93f445c6b8166f76f5505a",
                    "rows": 197,
                }
            ],
            "samples": 128,
            "length": 512,
            "tokens": 65536,
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        },
        "size": {
            "before_bytes": 269060552,
            "after_bytes": 113142088,
            "ratio": 0.4205,
            "parts": [
                {"part": "embeddings", "before_bytes": 56623104, "after_bytes": 56623104},
                {"part": "attention", "before_bytes": 53084160, "after_bytes": 14100480},
                {"part": "mlp", "before_bytes": 159252480, "after_bytes": 42301440},
                {"part": "norms", "before_bytes": 70272, "after_bytes": 70272},
                {"part": "other", "before_bytes": 0, "after_bytes": 0},
            ],
        },
        "layers": sample_layers(blocks, rng),
        "kept": [{"name": "lm_head", "reason": "in keep"}],
        "notes": ["The output head is the embedding matrix and stays as it is."],
        "plan": {
            "predicted": {
                "peak_host_bytes": 1181116006,
                "peak_device_bytes": 0,
                "disk_bytes": 381681664,
                "output_bytes": 113090000,
                "seconds": 251.0,
            },
            "measured": {
                "peak_host_bytes": 1106247680,
                "peak_device_bytes": 0,
                "disk_bytes": 371195904,
                "output_bytes": 113142088,
                "seconds": 283.4,
            },
        },
        "timing": {
            "total_seconds": 712.4,
            "stages": {"source": 4.1, "calibrate": 2.6, "compress": 276.5, "prove": 12.8, "evaluate": 402.9},
        },
        "proof": {
            "passed": True,
            "engine": "transformers 5.22.2",
            "compressed_tensors": "0.20.0",
            "tokens": 1024,
            "max_abs_difference": 0.0000314,
            "relative_rms": 0.00000182,
            "tolerance": 0.001,
            "top1_agreement": 1.0,
        },
        "engines": [
            {"engine": "transformers", "loads": True, "why": "needs compressed-tensors"},
            {"engine": "vLLM", "loads": True, "why": ""},
            {
                "engine": "GGUF converters",
                "loads": False,
                "why": "they read no compressed-tensors folder; write dense output for them",
            },
        ],
        "scores": sample_scores(rng),
        "versions": {
            "llmcompress": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "transformers": "5.22.2",
            "compressed-tensors": "0.20.0",
        },
        "machine": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_bytes": 16777216000, "gpu": None},
    }


def without_scores(results: dict[str, Any]) -> None:
    results["scores"] = None


def without_base(results: dict[str, Any]) -> None:
    scores = results["scores"] | {"divergence": None}
    scores["perplexity"] = [item | {"base": None, "ratio": None} for item in scores["perplexity"]]
    nothing = {"base": None, "difference": None, "difference_stderr": None, "recovery": None, "recovery_stderr": None}
    scores["tasks"] = [item | nothing for item in scores["tasks"]]
    results["scores"] = scores


def without_data(results: dict[str, Any]) -> None:
    results["calibration"] = None
    for layer in results["layers"]:
        layer |= {"method": "hqq", "error": None}
        del layer["bits"], layer["group_size"], layer["symmetric"]


def some_without_data(results: dict[str, Any]) -> None:
    for layer in results["layers"][:14]:
        layer |= {"method": "rtn", "bits": 8, "group_size": "row", "symmetric": False, "error": None}


def one_block(results: dict[str, Any]) -> None:
    results["layers"] = sample_layers(1, random.Random(1))


def eighty_blocks(results: dict[str, Any]) -> None:
    results["layers"] = sample_layers(80, random.Random(1))


def nothing_compressed(results: dict[str, Any]) -> None:
    results |= {"layers": [], "kept": [], "notes": [], "format": "dense"}


def outlier(results: dict[str, Any]) -> None:
    results["layers"][13]["error"] = 0.0004


def experts(results: dict[str, Any]) -> None:
    for index, layer in enumerate(results["layers"]):
        layer["name"] = f"model.layers.{layer['block']}.mlp.experts.{index % 7}.up_proj"


VARIANTS: list[Callable[[dict[str, Any]], None]] = [
    lambda results: None,
    without_scores,
    without_base,
    without_data,
    some_without_data,
    one_block,
    eighty_blocks,
    nothing_compressed,
    outlier,
    experts,
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.__name__.strip("<>"))
def results(request: pytest.FixtureRequest) -> dict[str, Any]:
    made = sample_results()
    request.param(made)
    return made


# Every number comes from results.json


def leaves(value: Any) -> Iterator[Any]:
    """The strings and numbers in a JSON value, keys included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield value


def page_text(page: str) -> str:
    """What a reader of the page sees, the titles of SVG marks included and the ticks of axes left out."""
    page = re.sub(r"<style>.*?</style>|<text class=\"tick[^>]*>.*?</text>", " ", page, flags=re.S)
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def card_text(card: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", MarkdownIt("commonmark").enable("table").render(card)))


FACTORS = {"": 1, "%": 100, "points": 100, "GiB": 2**-30, "MiB": 2**-20, "KiB": 2**-10, "B": 1, "s": 1}
DURATION = re.compile(r"(\d+) h (\d+) min|(\d+) min (\d+) s")
NUMBER = re.compile(r"([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)\s?(%|points|[GMK]iB|B\b|s\b|)")


def strange_numbers(text: str, results: dict[str, Any], recipe: str) -> list[str]:
    """Numbers in `text` that are neither numbers of `results`, in a unit and rounded, nor part of its strings."""
    numbers = [float(leaf) for leaf in leaves(results) if not isinstance(leaf, str)]
    strings = {leaf for leaf in leaves(results) if isinstance(leaf, str)} | set(map(str.strip, recipe.splitlines()))
    for string in sorted((s for s in strings if re.search(r"\d", s)), key=len, reverse=True):
        text = text.replace(string, " ")
    text = re.sub(r"(\S+) ± (\S+) points", r"\1 points ± \2 points", text)

    @functools.cache
    def forms(unit: str, form: str) -> set[str]:
        return {f"{FACTORS[unit] * n:{form}}" for n in numbers}

    strange = []
    for match in DURATION.finditer(text):
        hours, over, minutes, seconds = (int(group or 0) for group in match.groups())
        shown, slack = (hours * 3600 + over * 60, 30) if match[1] else (minutes * 60 + seconds, 0.5)
        strange += [] if any(abs(shown - n) <= slack for n in numbers) else [match[0]]
    for match in NUMBER.finditer(DURATION.sub(" ", text)):
        digits = match[1].replace(",", "")
        form = f"{'+' * (digits[0] == '+')}.{len(digits.partition('.')[2])}f"
        strange += [] if digits in forms(match[2], form) | forms(match[2], ".3g") else [match[0]]
    return strange


def test_every_number_is_in_the_results(results):
    assert strange_numbers(page_text(report_page(results, RECIPE)), results, RECIPE) == []
    card = card_text(model_card(results, RECIPE))
    results["layers"] = [layer | {"block": 0} for layer in results["layers"]]  # else any small number would pass
    assert strange_numbers(card, results, RECIPE) == []


def test_the_check_of_numbers_finds_what_is_not_in_the_results():
    made = sample_results()
    text = page_text(report_page(made, RECIPE))
    for added in ("23.15", "107.8 MiB", "57.3%", "12 min 10 s", "6e-05"):
        assert strange_numbers(f"{text} {added}", made, RECIPE) == [added]


def test_numbers_that_matter_are_shown_on_both():
    made = sample_results()
    for text in (page_text(report_page(made, RECIPE)), card_text(model_card(made, RECIPE))):
        for number in (
            "256.6 MiB",
            "107.9 MiB",
            "0.420",
            "21.36 ± 0.41",
            "23.14 ± 0.46",
            "1.083 ± 0.006",
            "0.0831 ± 0.00147",
            "86.1%",
            "60.5% ± 3.4%",
            "1.10 GiB",
            "1.03 GiB",
            "4 min 11 s",
            "4 min 43 s",
            "3.14e-05",
        ):
            assert number in text


def test_templates_refuse_numbers_that_skipped_show():
    for options in ({"autoescape": True, "finalize": printable}, {"autoescape": False, "finalize": markdown}):
        template = environment(**options).from_string("{{ x }}")
        assert template.render(x=show(0.5, "fixed")) == "0.50"
        for number in (0.5, 3, True, None):
            with pytest.raises(TypeError, match="without a unit"):
                template.render(x=number)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "bytes", "–"),
        (0, "bytes", "0 B"),
        (1023, "bytes", "1023 B"),
        (1536, "bytes", "1.5 KiB"),
        (2**20, "bytes", "1.0 MiB"),
        (3 * 2**30, "bytes", "3.00 GiB"),
        (0, "seconds", "0.0 s"),
        (59.94, "seconds", "59.9 s"),
        (59.96, "seconds", "1 min 00 s"),
        (3599.7, "seconds", "1 h 00 min"),
        (5000, "seconds", "1 h 23 min"),
        (0.3456, "percent", "34.6%"),
        (-0.0123, "points", "-1.2"),
        (0.0123, "points", "+1.2"),
        (134515008, "count", "134,515,008"),
        (1e-5, "significant", "1e-05"),
        (float("nan"), "fixed", "not finite"),
    ],
)
def test_show(value, unit, text):
    assert show(value, unit) == text


# The card


def test_front_matter_is_what_the_hub_reads():
    data = ModelCard(model_card(sample_results(), RECIPE)).data.to_dict()
    assert data == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmcompress", "compressed-tensors", "gptq"],
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
    }


@pytest.mark.parametrize(
    "source",
    [
        {"data": "boolq-calibration", "revision": None},
        {"data": "boolq-calibration", "revision": "0.9.0"},
        {"data": "data/wiki.txt", "revision": None},
        {"data": "/data/wiki.txt", "revision": "a" * 40},
        {"data": "../wiki.txt", "revision": "a" * 40},
    ],
    ids=lambda source: f"{source['data']}-{source['revision']}",
)
def test_data_that_are_not_on_the_hub_are_not_named_as_datasets(source):
    made = sample_results()
    made["calibration"]["sources"] = [source | {"rows": 5}]
    assert "datasets" not in front_matter_of(model_card(made, RECIPE))


def test_front_matter_leaves_out_what_is_not_known():
    made = sample_results()
    made["base_model"] |= {"hub_id": None, "license": None}
    data = front_matter_of(model_card(made, RECIPE))
    assert not {"base_model", "base_model_relation", "license"} & set(data)


def test_a_license_that_is_no_identifier_is_named_as_other():
    made = sample_results()
    made["base_model"]["license"] = "My Own License"
    data = front_matter_of(model_card(made, RECIPE))
    assert (data["license"], data["license_name"]) == ("other", "My Own License")


def test_card_says_how_to_load_only_where_it_loads():
    made = sample_results()
    assert "AutoModelForCausalLM" in (card := model_card(made, RECIPE))
    assert "vllm serve" in card
    note = "on transformers 5.23.0 pass CompressedTensorsConfig(dequantize=True)"
    made["engines"] = [
        {"engine": "transformers", "loads": True, "why": note},
        {"engine": "vLLM", "loads": False, "why": "asymmetric"},
    ]
    card = model_card(made, RECIPE)
    assert note in card
    assert "vllm serve" not in card


def test_recipe_stands_on_the_card_as_written():
    recipe = RECIPE + "# ```\n# ````yaml\n"
    tokens = MarkdownIt().parse(model_card(sample_results(), recipe))
    assert [t.content for t in tokens if t.type == "fence" and t.info == "yaml"] == [recipe]


def front_matter_of(card: str) -> dict[str, Any]:
    head, closing = card.removeprefix("---\n").split("\n---\n", 1)
    assert closing.strip()
    return yaml.safe_load(head)


# Hostile strings


PLAIN = "Plainword"
HOSTILE = [
    "<script>alert()</script>",
    "a | b",
    "a\n\n---\nlicense: mit\n---\n# b",
    "\"'`$(rm -rf ~)`",
    "](javascript:alert) ![x](http://x)",
    "**bold** __x__ ~~x~~ \\| \\",
    "{{ name }} {% raw %}",
    "```\n<img src=x onerror=alert()>",
    "- # > + =",
    "</title></svg></style>",
    "\x00\x1b[31m[red]é漢",
]


def with_strings(value: Any, text: str, *, keep: tuple[str, ...] = ("sha256", "format")) -> Any:
    """A copy of a JSON value in which every string but those of `keep` is `text`."""
    if isinstance(value, dict):
        return {key: item if key in keep else with_strings(item, text, keep=keep) for key, item in value.items()}
    if isinstance(value, list):
        return [with_strings(item, text, keep=keep) for item in value]
    return text if isinstance(value, str) else value


def hostile_results(text: str) -> dict[str, Any]:
    made = sample_results(blocks=1)
    engines = [engine | {"why": text} for engine in made["engines"]]  # their names decide what the card shows
    recipe = made["recipe"] | {"publish": {"repo_id": text}}
    return with_strings(made, text) | {"engines": engines, "recipe": recipe}


def tags_of(page: str) -> list[str]:
    """Every tag of the page in order, from a strict parser: but for two void elements the page is XML."""
    xml = re.sub(r"<(meta|br)\b([^>]*)>", r"<\1\2/>", page.removeprefix("<!DOCTYPE html>\n"))
    root = ElementTree.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", xml))
    return [element.tag for element in root.iter()]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_strings_cannot_break_out(text):
    check_strings_are_inert(text)


@settings(max_examples=6, deadline=None)
@given(st.text(st.sampled_from("<>&|`*_[]()#-+=~\\$\"'!{}%:\n\r\t .1aé"), min_size=1, max_size=24).filter(str.strip))
def test_no_string_breaks_out(text):
    check_strings_are_inert(text)


def check_strings_are_inert(text: str) -> None:
    """With `text` for every string, page and card have the structure that they have with a plain word."""
    hostile, (page, expected) = hostile_results(text), plain_documents()
    assert tags_of(report_page(hostile, RECIPE)) == tags_of(page)
    card = model_card(hostile, RECIPE)
    assert structure(card) == structure(expected)
    shown = re.sub(r"[\s\x00-\x1f\x7f]", "", text)
    assert lines_of(card) == [line.replace(PLAIN, shown) for line in lines_of(expected)]
    assert set(front_matter_of(card)) - {"license_name"} == set(front_matter_of(expected)) - {"license_name"}


@functools.cache
def plain_documents() -> tuple[str, str]:
    plain = hostile_results(PLAIN)
    return report_page(plain, RECIPE), model_card(plain, RECIPE)


def lines_of(card: str) -> list[str]:
    """The text of every paragraph, heading and cell of a card, as a reader sees it but for white space."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body(card))
    texts = ["".join(child.content for child in t.children or ()) for t in tokens if t.type == "inline"]
    return [re.sub(r"\s", "", text) for text in texts]


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def structure(card: str) -> list[str]:
    """Kinds of Markdown tokens of a card's body, what is inside lines included, plain text left out."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body(card))
    plain = ("text", "text_special", "softbreak")
    return [t.type for token in tokens for t in (token, *(token.children or ())) if t.type not in plain]


# The page


def test_page_is_self_contained_and_small(results):
    page = report_page(results, RECIPE)
    assert len(page.encode()) < 300_000
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bhref=|https?://", page)


def test_page_is_well_formed_and_its_pictures_are_described(results):
    page = report_page(results, RECIPE)
    tags_of(page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for labels in re.findall(r'aria-labelledby="([^"]*)"', page):
        assert set(labels.split()) <= set(ids)
    pictures = re.findall(r"<svg[^>]*>", page)
    assert all('aria-hidden="true"' in svg or 'role="img" aria-labelledby=' in svg for svg in pictures)
    assert page.count("<figure>") == page.count("<figcaption>")


def test_marks_stay_inside_their_picture(results):
    page = report_page(results, RECIPE)
    pictures = re.findall(r'<svg viewBox="0 0 (\d+) ([\d.]+)" role="img"(.*?)</svg>', page, flags=re.S)
    assert pictures
    for width, height, picture in pictures:
        points = re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)|c?x=\"([-\d.]+)\" c?y=\"([-\d.]+)\"", picture)
        assert points
        for x, y in [(float(a or c), float(b or d)) for a, b, c, d in points]:
            assert 0 <= x <= float(width)
            assert 0 <= y <= float(height)


def test_each_linear_is_one_mark_with_its_name_and_error():
    made = sample_results()
    page = report_page(made, RECIPE)
    for layer in made["layers"]:
        assert f"<title>{layer['name']}: {show(layer['error'], 'significant')}</title>" in page
    assert "Relative weight error" not in page


@pytest.mark.parametrize(
    ("variant", "figures"),
    [
        (without_data, ["Relative weight error"]),
        (some_without_data, ["Relative output error", "Relative weight error"]),
        (nothing_compressed, []),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_methods_without_data_have_a_picture_of_their_own(variant, figures):
    made = sample_results()
    variant(made)
    assert re.findall(r"<figcaption><h2>(Relative \w+ error)", report_page(made, RECIPE)) == figures


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([0.0], False),
        ([3.2], False),
        ([-1.0, 4.0], False),
        ([0.0, 0.317], False),
        ([1e-9, 2e-9], False),
        ([21.3, 23.9], False),
        ([3.2], True),
        ([0.0004, 0.2], True),
        ([1e-9, 1e-6], True),
    ],
    ids=str,
)
def test_axis_holds_its_values_and_has_ticks(values, log):
    axis = Axis.around(values, log=log)
    assert all(-1e-9 <= axis.at(v) <= 1 + 1e-9 for v in values)
    assert all(-1e-9 <= label["at"] <= 1 + 1e-9 for label in axis.labels())
    assert 1 <= len(axis.labels()) <= 9


# The folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(sample_results()))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_write_report_writes_two_files_and_the_same_bytes_again(folder):
    paths = write_report(folder)
    assert [path.name for path in paths] == ["README.md", "report.html"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(folder)] == first
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "recipe.yaml", "report.html", "results.json"]


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    (folder / "README.md").write_text("old")
    monkeypatch.setattr("os.fsync", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert (folder / "README.md").read_text() == "old"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", "{", "not valid JSON"),
        ("results.json", '{"schema": 7}', "expected schema 1, found 7"),
        ("results.json", '{"schema": 1}', "run the recipe again"),
        ("results.json", None, "cannot be read"),
        ("recipe.yaml", None, "cannot be read"),
    ],
    ids=["broken", "other-schema", "no-fields", "no-results", "no-recipe"],
)
def test_a_folder_that_is_no_finished_run_is_refused(folder, name, text, message):
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(FormatError, match=message):
        write_report(folder)
    assert not (folder / "README.md").exists()


def test_a_missing_field_is_named(folder):
    made = sample_results()
    del made["proof"]["relative_rms"]
    (folder / "results.json").write_text(json.dumps(made))
    with pytest.raises(FormatError, match="relative_rms"):
        write_report(folder)


def test_summary_table_shows_scores_size_and_memory(results):
    given_results = copy.deepcopy(results)
    console = Console(file=io.StringIO(), width=140)
    console.print(summary_table(results))
    text = console.file.getvalue()
    assert "256.6 MiB" in text
    assert "predicted 1.10 GiB" in text
    assert ("23.14 ± 0.46" in text) == (results["scores"] is not None)
    assert strange_numbers(text, results, RECIPE) == []
    assert results == given_results


def test_summary_table_prints_markup_of_users_literally():
    console = Console(file=io.StringIO(), width=140)
    console.print(summary_table(hostile_results("[red]x[/]")))
    assert "[red]x[/]" in console.file.getvalue()
