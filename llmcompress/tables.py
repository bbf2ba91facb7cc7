"""Tables for the terminal, and the rows of `list`."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from llmcompress.adapter_plan import AdapterPlan
from llmcompress.at_runtime import RUNTIMES
from llmcompress.catalog import DATASETS, MODELS
from llmcompress.cost import LIBRARIES, Phase
from llmcompress.formats import FORMATS
from llmcompress.hub import Upload
from llmcompress.machine import gib
from llmcompress.methods import METHODS, Method, Pruner
from llmcompress.options import Options
from llmcompress.plan import Plan
from llmcompress.recipe import recipe_paths
from llmcompress.runtime_plan import RuntimePlan
from llmcompress.structure import STRUCTURE_WORDS, STRUCTURES
from llmcompress.structure.scores import BLOCK_SCORES, CHANNEL_SCORES, UNIT_SCORES
from llmcompress.suite import suite_paths
from llmcompress.training import TRAININGS
from llmcompress.training_plan import TrainPlan, updated_linears


def plan_tables(plan: Plan) -> Iterator[Table]:
    """What happens to the linears, kind by kind; what is left alone; what it costs."""
    kinds: dict[tuple[str, tuple[int, int], str], list[int]] = {}
    updated = {linear.name for linear in updated_linears(plan)} if isinstance(plan, AdapterPlan) else set()
    pruned = {linear.name for linear in plan.targets} if isinstance(plan, TrainPlan) else set()
    for linear in plan.linears:
        kind = linear.name.split(".", len(plan.blocks.split(".")) + 1)[-1]
        what = ", then ".join(
            describe(plan.steps[i].name, method) for i, method in zip(linear.steps, linear.methods, strict=True)
        )
        if linear.after_bytes < linear.before_bytes and not what:
            what = "becomes smaller" if linear.after_bytes else "goes with its block"
        whole = isinstance(plan, TrainPlan) and not isinstance(plan, AdapterPlan)
        untouched = "is trained" if whole else "left alone"
        if linear.name in pruned:
            untouched = "is pruned while it is trained"
        if linear.name in updated:
            what = f"{what}, then LoRA" if what else "LoRA"
        if isinstance(plan, RuntimePlan) and plan.sparse(linear.name):
            what = f"{what}, then {plan.step.name}" if what else f"{plan.step.name}; weights stay"
        row = kinds.setdefault((kind, linear.shape, what or untouched), [0, 0, 0])
        for i, value in enumerate((1, linear.before_bytes, linear.after_bytes)):
            row[i] += value
    table = make_table(
        f"{plan.source.name} as {plan.format_name}", "linear", "number", "out x in", "method", "before", "after"
    )
    for (kind, shape, method), (count, before, after) in kinds.items():
        add(table, kind, str(count), f"{shape[0]} x {shape[1]}", method, gib(before), gib(after))
    yield table
    yield from ([two_columns("Left alone", plan.kept.items())] if plan.kept else [])
    yield from ([two_columns("Notes", [("", note) for note in plan.notes])] if plan.notes else [])
    cost = plan.predicted
    yield two_columns(
        "Prediction",
        [
            ("model before", f"{gib(plan.before_bytes)} in {plan.recipe.dtype}"),
            ("result", gib(cost.output_bytes)),
            ("peak host memory", gib(cost.peak_host_bytes)),
            ("peak device memory", gib(cost.peak_device_bytes)),
            *scoring_rows(plan),
            ("disk", gib(cost.disk_bytes)),
            ("time, evaluation aside", f"about {cost.seconds:.0f} s"),
        ],
    )


def scoring_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What a structure step takes to find out which units go, if it looks at more than weights."""
    scoring: Phase | None = getattr(plan, "scoring", None)  # the class of such plans needs torch, plans of methods none
    if scoring and scoring.seconds:
        memory = gib(LIBRARIES + scoring.memory)
        yield "scoring alone", f"{memory}, about {scoring.seconds:.0f} s, {gib(scoring.disk)} of disk"


def describe(name: str, method: Any) -> str:
    """A method with its options in a few words."""
    options = method.model_dump()
    words = [name]
    if method.prunes:
        over = {"owl": " on average, by owl", "global": " on average, by a global ranking"}
        words.append(f"{method.prunes}, {method.share:.0%} removed{over.get(options.get('budget', ''), '')}")
    if "bits" in options:
        words.append(f"{options['bits']}-bit")
        words.append("whole rows" if options["group_size"] == "row" else f"group {options['group_size']}")
        words.append("symmetric" if options["symmetric"] else "asymmetric")
    return " ".join(words)


def score_table(scores: dict[str, Any]) -> Table:
    """Scores of `eval`."""
    title = f"suite {scores['suite']['name']} (version {scores['suite']['version']}), {scores['dtype']}"
    title += ", with its adapter" if scores["adapter"] else ""
    title += ", with its thresholds" if scores["thresholds"] else ""
    table = make_table(title, "score", "model", "base")
    for row in scores["perplexity"]:
        add(table, f"perplexity {row['name']}", spread(row["compressed"], 1, 2), spread(row["base"], 1, 2))
    if divergence := scores["divergence"]:
        add(table, "KL to the base, nats", plus_minus(divergence["kl"], divergence["kl_stderr"], 1, 4), "")
        add(table, "top-1 agreement, %", f"{100 * divergence['top1_agreement']:.1f}", "")
    for row in scores["tasks"]:
        add(table, f"{row['name']} {row['metric']}, %", spread(row["compressed"], 100, 1), spread(row["base"], 100, 1))
    return table


def spread(score: dict[str, float] | None, unit: float, digits: int) -> str:
    """value ± stderr of a score, nothing for none."""
    return plus_minus(score["value"], score["stderr"], unit, digits) if score else ""


def plus_minus(value: float, stderr: float | None, unit: float, digits: int) -> str:
    """value ± stderr; the value alone where there is no error to give, as for a single window."""
    error = "" if stderr is None else f" ± {stderr * unit:.{digits}f}"
    return f"{value * unit:.{digits}f}{error}"


def inspection_tables(found: dict[str, Any]) -> Iterator[Table]:
    """Tensors and engines of `inspect`."""
    table = make_table(
        f"{found['folder']}: {gib(found['bytes'])}", "tensor", "format", "shape", "bits", "density", "bytes"
    )
    for row in found["tensors"]:
        shape = " x ".join(str(size) for size in row["shape"])
        add(table, row["name"], row["format"], shape, f"{row['bits']:.2f}", f"{row['density']:.3f}", str(row["bytes"]))
    yield table
    if thresholds := found["thresholds"]:
        words = (
            f"{thresholds['sparsity']:.1%} of the weights of {thresholds['linears']} linears are left out for each "
            f"token but the first {thresholds['dense_tokens']}, by llmcompress.load alone"
        )
        yield two_columns("Run time", [("thresholds", words)])
    yield two_columns(
        "Engines", [(f"{e['engine']}: {'yes' if e['loads'] else 'no'}", e["why"]) for e in found["engines"]]
    )


def bench_table(found: dict[str, Any]) -> Table:
    """Packed beside dense, of `bench`."""
    packed, dense, ratios = found["measured"]["packed"], found["measured"]["dense"], found["ratios"]
    case, machine = found["sides"]["packed"], found["machine"]
    title = f"{case['folder']}: {machine['processor']}, {packed['threads']} threads, {packed['device']}"
    table = make_table(title, "", "packed", "dense", "ratio")
    for name, key in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second")):
        what = f"{name}, {case['prompt'] if name == 'prefill' else case['new']} tokens"
        add(table, what, f"{packed[key]:.1f} tokens/s", f"{dense[key]:.1f} tokens/s", f"{ratios[name]:.2f}")
    rows = {"memory after generating": "resident", "most memory": "peak", "weights read for a token": "read"}
    for what, name in rows.items():
        key = f"{name}_bytes"
        add(table, what, gib(packed[key]), gib(dense[key]), f"{ratios[name]:.2f}")
    add(table, "time to load", f"{packed['load_seconds']:.1f} s", f"{dense['load_seconds']:.1f} s", "")
    return table


def push_table(uploads: Sequence[Upload], repo_id: str) -> Table:
    """Files that `push --dry-run` would send."""
    table = make_table(f"would go to {repo_id}: {gib(sum(upload.bytes for upload in uploads))}", "file", "bytes")
    for upload in uploads:
        add(table, upload.path, str(upload.bytes))
    return table


def listing(what: str) -> list[dict[str, Any]]:
    """Rows of `list`: a name and what it is."""
    if what in ("recipes", "suites"):
        paths = recipe_paths() if what == "recipes" else suite_paths()
        return [
            {"name": name, "description": first_comment(path.read_text("utf-8")), "file": str(path)}
            for name, path in paths.items()
        ]
    if what == "methods":
        return [
            {
                "name": name,
                "description": first_line(method),
                "data": data_of(method),
                "options": options_of(method),
            }
            for name, method in METHODS.items()
        ]
    if what == "structures":
        return [
            {"name": name, "description": STRUCTURE_WORDS[name], "options": options_of(structure)}
            for name, structure in STRUCTURES.items()
        ]
    if what == "runtimes":
        return [
            {"name": name, "description": first_line(each), "options": options_of(each)}
            for name, each in RUNTIMES.items()
        ]
    if what == "trainings":
        return [
            {"name": name, "description": first_line(training), "options": options_of(training)}
            for name, training in TRAININGS.items()
        ]
    if what == "scores":
        tables: dict[str, Any] = {"units": UNIT_SCORES, "blocks": BLOCK_SCORES, "hidden": CHANNEL_SCORES}
        return [
            {"name": name, "of": of, "description": first_line(score), "options": options_of(score)}
            for of, scores in tables.items()
            for name, score in scores.items()
        ]
    if what == "formats":
        return [
            {"name": name, "description": (type(fmt).__doc__ or "").partition("\n")[0]} for name, fmt in FORMATS.items()
        ]
    table: dict[str, Any] = dict(MODELS if what == "models" else DATASETS)
    return [{"name": name, "description": entry.description, "license": entry.license} for name, entry in table.items()]


def options_of(record: type[Options]) -> dict[str, Any]:
    """Names and defaults of a record's options."""
    return {k: "required" if f.is_required() else f.default for k, f in record.model_fields.items()}


def data_of(method: type[Method]) -> str:
    """What data a method takes, in a few words."""
    if method.needs:
        return "calibration"
    return "none; calibration with budget owl" if issubclass(method, Pruner) else "none"


def listing_table(what: str, rows: list[dict[str, Any]]) -> Table:
    """`list` as a table."""
    table = make_table(what, *(rows[0].keys() if rows else ["name"]))
    for row in rows:
        add(
            table,
            *(", ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x) for x in row.values()),
        )
    return table


def first_line(cls: type) -> str:
    """First line of the docstring of the module that a class is in."""
    import inspect
    import sys

    return (inspect.getdoc(sys.modules[cls.__module__]) or "").partition("\n")[0]


def first_comment(text: str) -> str:
    """First comment line of a YAML file."""
    return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")


def two_columns(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and what is said about them."""
    table = make_table(title, "", "")
    table.show_header = False
    for name, text in rows:
        add(table, name, text)
    return table


def make_table(title: str, *columns: str) -> Table:
    """An empty table; no text in it is read as markup."""
    return Table(*(Column(Text(column)) for column in columns), title=Text(title), title_justify="left")


def add(table: Table, *cells: object) -> None:
    """A row of plain text, whatever characters it holds."""
    table.add_row(*(Text(str(cell)) for cell in cells))
