"""A run: recipe in, finished folder out. Sources, plan, job, proof, scores and report meet here.

    source -> plan -> checks -> calibration -> blocks, one after another -> what is outside the blocks
           -> proof of loading -> scores -> card and report -> final name -> Hub

Until the last rename everything lives in DIR.partial; a killed run continues from its last finished block.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from llmcompress import cost
from llmcompress.arch import quiet_transformers
from llmcompress.calibrate import load_calibration
from llmcompress.checkpoint import (
    Checkpoint,
    full_disk_explained,
    partial_folder,
)
from llmcompress.errors import PlanError, PublishError, ResumeError
from llmcompress.files import MANIFEST, read_json, write_json
from llmcompress.job import Built, Data, Job, build, stock_errors
from llmcompress.plan import Plan, check_machine, make_plan
from llmcompress.progress import Progress, Silent
from llmcompress.proof import proof_blocks, prove
from llmcompress.recipe import Recipe
from llmcompress.report import write_report
from llmcompress.results import Clock, Outcome, collect_results, manifest, peak_bytes
from llmcompress.source import ModelSource, open_source


def run(
    recipe: Recipe, output: Path, *, overwrite: bool = False, evaluate: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Carry out a recipe; the finished folder is `output`. Returns the contents of its results.json.

    Continues a killed run of the same recipe. evaluate=False skips the recipe's scores.
    Raises a subclass of LLMCompressError for everything the user can mend; then nothing has the name `output`.
    """
    check_output(output, overwrite)
    with full_disk_explained(partial_folder(output)), full_device_explained():
        return run_stages(recipe, output, overwrite=overwrite, evaluate=evaluate, progress=progress or Silent())


def run_stages(recipe: Recipe, output: Path, *, overwrite: bool, evaluate: bool, progress: Progress) -> dict[str, Any]:
    """The stages of a run, in order."""
    clock = Clock()
    with clock.stage("source"):
        plan, source, built = prepare(recipe, output, progress)
    with clock.stage("calibrate"):
        progress.stage("calibrating", 1)
        data, tokenizer = load_data(plan)
        if evaluate and recipe.evaluate:
            check_suite(recipe, source)
    job = Job(plan, source, data, tokenizer, output, progress, built)
    with closing(job.open(overwrite=overwrite)) as checkpoint:
        if checkpoint.finished():
            results = read_json(checkpoint.partial / "results.json")
        else:
            results = make_folder(job, checkpoint, clock, evaluate=evaluate)
        checkpoint.complete(overwrite=overwrite)
    publish(recipe, output, progress)
    return results


def make_folder(job: "Job", checkpoint: Checkpoint, clock: Clock, *, evaluate: bool) -> dict[str, Any]:
    """Everything in DIR.partial: compressed, proved, scored and described. Returns the contents of results.json."""
    plan, progress = job.plan, job.progress
    with clock.stage("compress"):
        job.compress(checkpoint)
    peak = peak_bytes()
    peak_device = torch.cuda.max_memory_allocated() if plan.device.type == "cuda" else 0
    with clock.stage("prove"):
        progress.stage("proving that it loads", 1)
        proof = prove(plan, checkpoint.partial, checkpoint.state / "expected", job.proof_blocks)
    with clock.stage("evaluate"):
        scores = job.scores(checkpoint.partial) if evaluate and plan.recipe.evaluate else None
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    results = collect_results(
        Outcome(
            plan,
            checkpoint,
            parameters,
            job.data.record,
            proof,
            scores,
            clock,
            peak,
            peak_device,
            plan.source.fetch_bytes,
        )
    )
    write_json(checkpoint.partial / "results.json", results)
    write_json(checkpoint.partial / MANIFEST, manifest(results, checkpoint.fingerprint))
    write_report(checkpoint.partial)
    return results


@contextmanager
def full_device_explained() -> Iterator[None]:
    """Say what to do when a GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise PlanError(
            f"device: its memory does not suffice ({' '.join(str(exc).split())[:200]}); use `device: cpu`, or fewer or "
            "shorter calibration samples; the same command then starts anew"
        ) from exc


def check_output(output: Path, overwrite: bool) -> None:
    """The final name must be free, or with `overwrite` hold a folder that a run has made."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise ResumeError(f"{output}: exists; give --overwrite to replace it when the run is done, or another --output")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise ResumeError(
            f"{output}: was not made by llmcompress (it holds no {MANIFEST}), so --overwrite does not remove it; "
            "give another --output"
        )


def prepare(recipe: Recipe, output: Path, progress: Progress) -> tuple[Plan, ModelSource, Built | None]:
    """Everything that can fail without a weight: source, plan, machine, rights on the Hub, the suite. Then fetch.

    Also returns the model without its weights, if its code is at hand before the fetch.
    """
    source = open_source(recipe.model, revision=recipe.revision)
    plan = make_plan(recipe, source)
    check_machine(plan, output)
    proof_blocks(plan)
    if recipe.evaluate:
        from llmcompress.suite import load_suite

        load_suite(recipe.evaluate.suite)
    built = None if recipe.trust_remote_code else build(plan)  # else its code must be fetched first
    if recipe.publish:
        from llmcompress.hub import check_rights

        check_rights(recipe.publish.repo_id, private=recipe.publish.private)
    for text in plan.notes:
        progress.note(text)
    progress.stage("fetching the model", max(1, source.fetch_bytes))
    return plan, source.fetch(lambda done, total: progress.advance(done)), built


def check_suite(recipe: Recipe, source: ModelSource) -> None:
    """The suite's data must be at hand before hours are spent on what it is to score."""
    from llmcompress.evaluate import check_data
    from llmcompress.suite import load_suite

    assert recipe.evaluate is not None
    assert source.folder is not None
    check_data(load_suite(recipe.evaluate.suite), source.folder, trust_remote_code=recipe.trust_remote_code)


def load_data(plan: Plan) -> tuple[Data, Any]:
    """Calibration tokens, or for data-free methods a few random ones for the proof; and the tokenizer."""
    from transformers import AutoTokenizer

    source = plan.source.fetch()
    with quiet_transformers(), stock_errors(source, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=plan.recipe.trust_remote_code
        )
    options = plan.recipe.calibration
    if not plan.needs_data or options is None:
        random = torch.Generator().manual_seed(0)
        shape = (cost.PROOF_SAMPLES, cost.PROOF_LENGTH)
        known = min(len(tokenizer), int(plan.source.config.get("vocab_size", len(tokenizer))))
        return Data(torch.randint(known, shape, generator=random), None), tokenizer
    found = load_calibration(options, tokenizer)
    record = {
        "sources": found.sources,
        "samples": len(found.tokens),
        "length": found.tokens.shape[1],
        "tokens": found.tokens.numel(),
        "sha256": found.sha256,
    }
    return Data(found.tokens, record), tokenizer


def publish(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Push the finished folder where the recipe says, if it says so."""
    from llmcompress.hub import push

    if recipe.publish is None:
        return
    progress.stage("publishing", 1)
    try:
        url = push(folder, recipe.publish.repo_id, private=recipe.publish.private)
    except PublishError as exc:
        visibility = "--private" if recipe.publish.private else "--public"
        exc.add_note(
            f"the run is complete; continue with: llmcompress push {folder} {recipe.publish.repo_id} {visibility}"
        )
        raise
    progress.note(f"published: {url}")
