"""The command line: `python -m llmcompress run | plan | eval | inspect | export | push | generate | bench | list`.

Results go to stdout; progress and everything else to stderr. Exit code 0: done. 2: the user can mend it, and one
message says how. 1: a bug of ours, with its traceback. Nothing heavy is imported before a command needs it.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress import __version__
from llmcompress.errors import LLMCompressError, RecipeError

if TYPE_CHECKING:
    from rich.table import Table

    from llmcompress.recipe import Recipe

app = typer.Typer(
    name="llmcompress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make Hugging Face causal LMs smaller, and prove that the result loads in stock engines.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file, or a name from `list recipes`.")]
Model = Annotated[str | None, typer.Option(help="Use this model instead of the recipe's.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one option, such as steps.0.bits=8.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
AnyModel = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, listed name, .gguf file or Hub id.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Compile the step that makes one token; takes a minute.")]
Device = Annotated[str, typer.Option(help="auto takes the GPU if there is one.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the folder's own Python code run.")]


@app.command("run")
def run_command(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option(help="Folder to make; default outputs/<model>-<recipe>.")] = None,
    model: Model = None,
    set_: Set = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Skip the recipe's scores.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder, or an unfinished run in it.")] = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe; given again after a kill, it continues."""
    quiet_libraries()
    from llmcompress.progress import reporter
    from llmcompress.recipe import default_output
    from llmcompress.report import summary_table
    from llmcompress.run import join, run
    from llmcompress.training.processes import is_first

    loaded, path = read_recipe(recipe, model, set_)
    folder = output or default_output(loaded, path)
    if not is_first():  # of the processes of an `accelerate launch`
        join(loaded)
        return
    with reporter() as progress:
        results = run(loaded, folder, overwrite=overwrite, evaluate=not no_eval, progress=progress)
    if as_json:
        print_json(results | {"folder": str(folder)})
    else:
        print_table(summary_table(results))
        print(f"{folder}")


@app.command("plan")
def plan_command(recipe: RecipeFile, model: Model = None, set_: Set = None, as_json: Json = False) -> None:
    """Show what a recipe would do and cost, without reading a weight."""
    from llmcompress.recipe import default_output
    from llmcompress.source import open_source
    from llmcompress.stages import check_stages, plain_stages, plan_stages

    loaded, path = read_recipe(recipe, model, set_)
    plans = [plan for _, plan in plan_stages(loaded, open_source(loaded.model, revision=loaded.revision))]
    check_stages(plans, default_output(loaded, path))
    if loaded.publish:
        from llmcompress.hub import check_rights

        check_rights(loaded.publish.repo_id, private=loaded.publish.private)
    if as_json:
        print_json(plain_stages(plans))
    else:
        from llmcompress.tables import plan_tables

        for plan in plans:
            for table in plan_tables(plan):
                print_table(table)


@app.command("eval")
def eval_command(
    model: AnyModel,
    suite: Annotated[str | None, typer.Option(help="A name from `list suites`, or a file; default quick.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas.")] = None,
    text: Annotated[Path | None, typer.Option(help="Score perplexity on this text instead.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows per text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    base: Annotated[str | None, typer.Option(help="Model to compare with.")] = None,
    as_json: Json = False,
) -> None:
    """Score a model, alone or beside the one it was made from."""
    quiet_libraries()
    from llmcompress.evaluate import evaluate, suite_from_options
    from llmcompress.progress import reporter, staged
    from llmcompress.tables import score_table

    chosen = suite_from_options(suite, tasks.split(",") if tasks else None, text, length, windows, limit)
    with reporter() as progress:
        folder, _ = local_folder(model)
        base_folder, fingerprint = local_folder(base) if base else (None, None)
        scores = evaluate(folder, chosen, base=base_folder, base_fingerprint=fingerprint, progress=staged(progress))
    if as_json:
        print_json(scores)
    else:
        print_table(score_table(scores))


@app.command("inspect")
def inspect_command(folder: Annotated[Path, typer.Argument(metavar="DIR")], as_json: Json = False) -> None:
    """Show per tensor format, bits, density and bytes; and which engines load the folder."""
    from llmcompress.inspection import inspect
    from llmcompress.tables import inspection_tables

    found = inspect(folder)
    if as_json:
        print_json(found)
    else:
        for table in inspection_tables(found):
            print_table(table)


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="namespace/name on the Hub")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a repository that the push creates.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a finished folder to the Hub; given again after a failure, it continues."""
    from llmcompress.hub import plan_push, push
    from llmcompress.tables import push_table

    uploads = plan_push(folder)
    url = None if dry_run else push(folder, repo_id, private=private)
    if as_json:
        print_json({"repo_id": repo_id, "url": url, "files": [upload._asdict() for upload in uploads]})
    elif dry_run:
        print_table(push_table(uploads, repo_id))
    else:
        print(url)


@app.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    format_name: Annotated[str, typer.Option("--format", help="A name from `list formats`.")] = "dense",
    pad_to_uniform: Annotated[
        bool, typer.Option("--pad-to-uniform", help="Fill blocks that differ in width with zeros, so that they agree.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder to write; default DIR-FORMAT.")] = None,
    as_json: Json = False,
) -> None:
    """Write a finished folder in another storage format that holds the same values."""
    from llmcompress.export import export
    from llmcompress.formats import FORMATS
    from llmcompress.pad import pad

    if format_name not in FORMATS or (pad_to_uniform and format_name != "dense"):
        known = "dense" if pad_to_uniform else ", ".join(FORMATS)
        raise RecipeError(f"--format {format_name}: no such format (known: {known})")
    name = f"{folder.name}-{'uniform' if pad_to_uniform else format_name}"
    output = output or folder.with_name(name)
    done = pad(folder, output) if pad_to_uniform else export(folder, format_name, output)
    if as_json:
        print_json(done)
    else:
        print(done["folder"])


@app.command("generate")
def generate_command(
    model: AnyModel,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    new: Annotated[int, typer.Option(min=1, help="Most tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sample; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Unpack the weights first.")] = False,
    compiled: Compiled = False,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Continue a prompt, on stdout as the tokens come; packed weights stay packed."""
    quiet_libraries()
    import torch
    from transformers import TextStreamer

    from llmcompress.generation import generate, load_to_generate, prompt_tokens, tokenizer_of
    from llmcompress.runtime import accelerated

    folder, _ = local_folder(model)
    tokenizer = tokenizer_of(folder, trust_remote_code=trust_remote_code)
    tokens = prompt_tokens(tokenizer, prompt, chat=chat)
    loaded = load_to_generate(
        folder, packed=not dense, dtype="auto", device=device, trust_remote_code=trust_remote_code
    )
    if done := accelerated(loaded):
        print(done.in_words(), file=sys.stderr)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate(loaded, tokens, new, compiled=compiled, streamer=streamer, **sampling)


@app.command("bench")
def bench_command(
    model: AnyModel,
    base: Annotated[str | None, typer.Option(help="Dense model to compare with; default MODEL, unpacked.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(min=3, help="Tokens to make.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each side, in turn; medians are shown.")] = 3,
    compiled: Compiled = False,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Tokens per second and memory of a packed model, beside the dense one in bfloat16."""
    quiet_libraries()
    from llmcompress.bench import bench
    from llmcompress.progress import reporter, staged
    from llmcompress.speed import Case
    from llmcompress.tables import bench_table

    folder = local_folder(model)[0]
    dense = local_folder(base)[0] if base else folder
    packed = Case(
        str(folder.absolute()), True, prompt, new, device=device, compiled=compiled, trust_remote_code=trust_remote_code
    )
    sides = {"packed": packed, "dense": replace(packed, folder=str(dense.absolute()), packed=False)}
    with reporter() as progress:
        found = bench(sides, rounds=rounds, progress=staged(progress))
    if as_json:
        print_json(found)
    else:
        print_table(bench_table(found))
        print(found["measured"]["packed"]["linears"])


class Listing(StrEnum):
    """What `list` can show."""

    models = "models"
    datasets = "datasets"
    methods = "methods"
    structures = "structures"
    scores = "scores"
    trainings = "trainings"
    runtimes = "runtimes"
    formats = "formats"
    recipes = "recipes"
    suites = "suites"


@app.command("list")
def list_command(what: Listing, as_json: Json = False) -> None:
    """Show the names that recipes can use."""
    from llmcompress.tables import listing, listing_table

    rows = listing(what.value)
    if as_json:
        print_json(rows)
    else:
        print_table(listing_table(what.value, rows))


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of no single command."""


# --- shared by commands ----------------------------------------------------------------------------------------------


def read_recipe(given: Path, model: str | None, changes: Sequence[str] | None) -> tuple["Recipe", Path]:
    """The recipe from a file or a listed name, with --model and --set applied; and its file."""
    import yaml

    from llmcompress.recipe import load_recipe, recipe_paths

    overrides: dict[str, Any] = {}
    for change in changes or []:
        key, found, value = change.partition("=")
        if not found or not key:
            raise RecipeError(f"--set {change}: expected KEY=VALUE, such as steps.0.bits=8")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"--set {change}: {value!r} is not a YAML value") from None
    if model is not None:
        overrides["model"] = model
    path = given if given.exists() else recipe_paths().get(str(given), given)
    return load_recipe(path, overrides), path


def local_folder(model: str) -> tuple[Path, str | None]:
    """Local folder and fingerprint of any model; a folder with more than dense weights is taken as it is."""
    from llmcompress.adapter import adapter_of
    from llmcompress.source import open_source
    from llmcompress.thresholds import FILE

    folder = Path(model)
    config = folder / "config.json"
    if (
        adapter_of(folder)
        or (folder / FILE).is_file()
        or (config.is_file() and "quantization_config" in config.read_text("utf-8"))
    ):
        return folder, None
    source = open_source(model).fetch()
    assert source.folder is not None
    return source.folder, source.fingerprint


def quiet_libraries() -> None:
    """Keep bars and advice of libraries off the terminal; must come before they are imported."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def print_json(values: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(values, indent=1, ensure_ascii=False, default=str))


def print_table(table: "Table") -> None:
    """A table on stdout; wide enough for its content when stdout is not a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; what the user can mend is said in one message."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="llmcompress")
    except LLMCompressError as exc:
        print("\n  ".join([f"error: {exc}", *getattr(exc, "__notes__", ())]), file=sys.stderr)
        sys.exit(2)
