"""A run: recipe in, finished folder out. Sources, plan, job, proof, scores and report meet here.

    source -> plan -> checks -> calibration -> blocks, one after another -> what is outside the blocks
           -> proof of loading -> scores -> card and report -> final name -> Hub

Until the last rename everything lives in DIR.partial; a killed run continues from its last finished block. A recipe of
several stages keeps the result of each in DIR.stages, proved like the last and scored on the
suite's texts, until the last has its name.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmcompress import cost
from llmcompress.adapter_job import AdapterJob
from llmcompress.adapter_plan import AdapterPlan
from llmcompress.arch import quiet_transformers
from llmcompress.building import Built, stock_errors
from llmcompress.calibrate import load_calibration
from llmcompress.checkpoint import (
    STATE,
    Checkpoint,
    full_disk_explained,
    partial_folder,
    stages_folder,
)
from llmcompress.errors import PlanError, PublishError, ResumeError
from llmcompress.files import MANIFEST, read_json, write_json
from llmcompress.hidden_job import HiddenJob
from llmcompress.hidden_plan import HiddenPlan
from llmcompress.job import Data, Job, Shared, build_for, data_from
from llmcompress.machine import device_of
from llmcompress.packed_source import opened
from llmcompress.plan import Plan
from llmcompress.progress import Progress, Silent
from llmcompress.proof import prove
from llmcompress.recipe import Recipe
from llmcompress.report import write_report
from llmcompress.results import (
    Clock,
    Origin,
    Outcome,
    Story,
    collect_results,
    manifest,
    peak_bytes,
    stage_record,
)
from llmcompress.runtime_job import RuntimeJob
from llmcompress.runtime_plan import RuntimePlan
from llmcompress.source import ModelSource, open_source
from llmcompress.stages import Link, check_stages, combined, plan_stages
from llmcompress.structure_budget import StructurePlan
from llmcompress.structure_job import DepthJob, WidthJob
from llmcompress.training.processes import leading, tasks
from llmcompress.training_job import TrainJob
from llmcompress.training_plan import TrainPlan


def run(
    recipe: Recipe, output: Path, *, overwrite: bool = False, evaluate: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Carry out a recipe; the finished folder is `output`. Returns the contents of its results.json.

    Continues a killed run of the same recipe. evaluate=False skips the recipe's scores.
    Raises a subclass of LLMCompressError for everything the user can mend; then nothing has the name `output`.
    """
    with leading(cpu=device_of(recipe) == "cpu"), full_disk_explained(partial_folder(output)), full_device_explained():
        check_output(output, overwrite)
        return run_stages(recipe, output, overwrite=overwrite, evaluate=evaluate, progress=progress or Silent())


def run_stages(recipe: Recipe, output: Path, *, overwrite: bool, evaluate: bool, progress: Progress) -> dict[str, Any]:
    """The stages of a run, in order."""
    clock = Clock()
    with clock.stage("source"):
        chain, source, built = prepare(recipe, output, progress)
    links, plans = [link for link, _ in chain], [plan for _, plan in chain]
    with clock.stage("calibrate"):
        progress.stage("calibrating", 1)
        data, tokenizer = load_data(recipe, source, needed=any(plan.needs_data for plan in plans))
        check_training_data(plans, tokenizer)
        if evaluate and recipe.evaluate:
            check_suite(recipe, source)
    built = built or build_for(replace(plans[0], source=source))
    parameters = sum(parameter.numel() for parameter in built[0].parameters())
    origin = Origin(recipe, source, parameters, plans[0].source.fetch_bytes)
    shared = Shared(origin, data, tokenizer, progress)
    plan, earlier = plans[0], list[dict[str, Any]]()
    for number, link in enumerate(links[:-1]):
        folder = stages_folder(output) / f"{number:02d}-{link.name.replace(' ', '')}"
        earlier.append(run_stage(shared, plan, link.name, folder, clock, evaluate=evaluate, overwrite=overwrite))
        plan = links[number + 1].plan(origin.named(opened(plans[number + 1].source, folder)))
    job = job_for(plan, shared, output, built if plan is plans[0] else None)
    with closing(job.open(overwrite=overwrite)) as checkpoint:
        if checkpoint.finished():
            results = read_json(checkpoint.partial / "results.json")
        else:
            curves = [curve for record in earlier for curve in record["training"]]
            story = Story(combined([plan.predicted for plan in plans]), links[-1].name, earlier, curves)
            results = make_folder(job, checkpoint, clock, story, evaluate=evaluate)
        checkpoint.complete(overwrite=overwrite)
    if len(links) > 1:
        remove_stages(output)
    publish(recipe, output, progress)
    return results


def join(recipe: Recipe) -> None:
    """For every process of an `accelerate launch` but the first: take part when that one trains, until it ends."""
    for task in tasks(cpu=device_of(recipe) == "cpu"):
        first = open_source(recipe.model, revision=recipe.revision).fetch()
        origin = Origin(recipe, first, parameters=0, fetched_bytes=0)
        data, tokenizer = load_data(recipe, first, needed=recipe.calibration is not None)
        chain = plan_stages(recipe, first)
        link, planned = next(each for each in chain if each[0].stage.steps[0].where == task["where"])
        plan = link.plan(origin.named(opened(planned.source, Path(task["source"]))))
        job = job_for(plan, Shared(origin, data, tokenizer, Silent()), Path(task["state"]))
        assert isinstance(job, TrainJob)
        job.join(Path(task["state"]))


def job_for(plan: Plan, shared: Shared, output: Path, built: Built | None = None) -> Job:
    """The job that carries out a plan, whose source is local by now."""
    kind: type[Job] = Job
    if isinstance(plan, HiddenPlan):
        kind = HiddenJob
    elif isinstance(plan, StructurePlan):
        kind = WidthJob if plan.groups else DepthJob
    elif isinstance(plan, TrainPlan):
        kind = AdapterJob if isinstance(plan, AdapterPlan) else TrainJob
    elif isinstance(plan, RuntimePlan):
        kind = RuntimeJob
    source = plan.source.fetch()
    return kind(replace(plan, source=source), source, shared, output, built)


def run_stage(
    shared: Shared, plan: Plan, name: str, folder: Path, clock: Clock, *, evaluate: bool, overwrite: bool
) -> dict[str, Any]:
    """Carry out a stage that is not the last; its record. Nothing is done again for a folder that has its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    job, found = job_for(plan, shared, folder), read_json(folder / MANIFEST)
    suite = text_suite(shared.origin.recipe) if evaluate else None
    if found.get("fingerprint") == job.fingerprint():
        clock.add("compress", found["stage"]["seconds"])
        if found.get("suite") != suite:  # of another try, that scored something else
            with clock.stage("evaluate"):
                scores = job.text_scores(folder) if suite else []
            found |= {"suite": suite, "stage": found["stage"] | {"perplexity": scores}}
            write_json(folder / MANIFEST, found)
        return dict(found["stage"])
    if folder.exists() and not overwrite:
        raise ResumeError(
            f"{folder}: holds this stage of another model, data, recipe or version; give --overwrite to do it anew, or "
            "another --output"
        )
    with closing(job.open(overwrite=overwrite)) as checkpoint:
        if not checkpoint.finished():
            start = time.monotonic()
            proof, peak = finish_tensors(job, checkpoint, clock)
            seconds = time.monotonic() - start
            with clock.stage("evaluate"):
                scores = job.text_scores(checkpoint.partial) if suite else []
            record = stage_record(job.plan, checkpoint, name, proof, peak, scores) | {"seconds": seconds}
            layers = [row for block in checkpoint.records() for row in block["layers"]]
            written = {"fingerprint": checkpoint.fingerprint, "suite": suite, "stage": record, "layers": layers}
            write_json(checkpoint.partial / MANIFEST, written)
        checkpoint.complete(overwrite=True)
    return dict(read_json(folder / MANIFEST)["stage"])


def text_suite(recipe: Recipe) -> dict[str, Any] | None:
    """What a stage is scored on: the texts of the recipe's suite, and what else decides their perplexity."""
    from llmcompress.suite import load_suite

    if recipe.evaluate is None:
        return None
    return load_suite(recipe.evaluate.suite).model_dump(mode="json", include={"dtype", "perplexity"})


def finish_tensors(job: Job, checkpoint: Checkpoint, clock: Clock) -> tuple[dict[str, Any], int]:
    """Compress, and prove that the result loads; the proof, and the peak memory before it."""
    with clock.stage("compress"):
        job.compress(checkpoint)
    peak = peak_bytes()
    with clock.stage("prove"):
        job.progress.stage("proving that it loads", 1)
        proof = prove(job.plan, checkpoint.partial, checkpoint.state / "expected", job.proof_blocks)
    return proof, peak


def make_folder(job: Job, checkpoint: Checkpoint, clock: Clock, story: Story, *, evaluate: bool) -> dict[str, Any]:
    """Everything in DIR.partial: compressed, proved, scored and described. Returns the contents of results.json."""
    start = time.monotonic()
    proof, peak = finish_tensors(job, checkpoint, clock)
    story = replace(story, seconds=time.monotonic() - start)
    plan, origin = job.plan, job.shared.origin  # a ranking may have decided otherwise than the plan knew
    if curve := read_json(checkpoint.state / "curve.json"):
        story.training.append(curve)
    peak_device = torch.cuda.max_memory_allocated() if plan.device.type == "cuda" else 0
    with clock.stage("evaluate"):
        scores = job.scores(checkpoint.partial) if evaluate and origin.recipe.evaluate else None
    results = collect_results(
        Outcome(plan, origin, checkpoint, story, job.shared.data.record, proof, scores, clock, peak, peak_device)
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
    """The final name must be free, or with `overwrite` hold a folder that a run has made; so must DIR.stages."""
    for folder in stages_folder(output).iterdir() if stages_folder(output).is_dir() else ():
        if not is_stage(folder):
            raise ResumeError(f"{folder}: was not made by llmcompress and is in the way; move it")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise ResumeError(f"{output}: exists; give --overwrite to replace it when the run is done, or another --output")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise ResumeError(
            f"{output}: was not made by llmcompress (it holds no {MANIFEST}), so --overwrite does not remove it; "
            "give another --output"
        )


def remove_stages(output: Path) -> None:
    """Remove the results of the stages of a run that is done; what it did not make stays."""
    for folder in stages_folder(output).iterdir() if stages_folder(output).is_dir() else ():
        if is_stage(folder):
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not empty, or not there
        stages_folder(output).rmdir()


def is_stage(folder: Path) -> bool:
    """Whether a folder below DIR.stages was made by a run."""
    return (folder / MANIFEST).is_file() or (folder / STATE / "run.json").is_file()


def prepare(
    recipe: Recipe, output: Path, progress: Progress
) -> tuple[list[tuple[Link, Plan]], ModelSource, Built | None]:
    """Everything that can fail without a weight: source, plans, machine, rights on the Hub, the suite. Then fetch.

    Also returns the model without its weights, if its code is at hand before the fetch.
    """
    source = open_source(recipe.model, revision=recipe.revision)
    chain = plan_stages(recipe, source)
    plan = chain[0][1]
    check_stages([each for _, each in chain], output)
    if recipe.evaluate:
        from llmcompress.suite import load_suite

        load_suite(recipe.evaluate.suite)
    built = None if recipe.trust_remote_code else build_for(plan)  # else its code must be fetched first
    if recipe.publish:
        from llmcompress.hub import check_rights

        check_rights(recipe.publish.repo_id, private=recipe.publish.private)
    for text in dict.fromkeys(note for _, each in chain for note in each.notes):
        progress.note(text)
    progress.stage("fetching the model", max(1, source.fetch_bytes))
    return chain, source.fetch(lambda done, total: progress.advance(done)), built


def check_suite(recipe: Recipe, source: ModelSource) -> None:
    """The suite's data must be at hand before hours are spent on what it is to score."""
    from llmcompress.evaluate import check_data
    from llmcompress.suite import load_suite

    assert recipe.evaluate is not None
    assert source.folder is not None
    check_data(load_suite(recipe.evaluate.suite), source.folder, trust_remote_code=recipe.trust_remote_code)


def check_training_data(plans: list[Plan], tokenizer: Any) -> None:
    """Text of its own that a later stage learns from must be at hand before the first stage."""
    for plan in plans:
        if isinstance(plan, TrainPlan) and plan.step.options.data:
            load_calibration(plan.step.options.data, tokenizer)


def load_data(recipe: Recipe, source: ModelSource, *, needed: bool) -> tuple[Data, Any]:
    """Calibration tokens, or if none are needed a few random ones for the proof; and the tokenizer."""
    from transformers import AutoTokenizer

    with quiet_transformers(), stock_errors(source, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=recipe.trust_remote_code
        )
    options = recipe.calibration
    if not needed or options is None:
        random = torch.Generator().manual_seed(0)
        shape = (cost.PROOF_SAMPLES, cost.PROOF_LENGTH)
        known = min(len(tokenizer), int(source.config.get("vocab_size", len(tokenizer))))
        return Data(torch.randint(known, shape, generator=random), None), tokenizer
    return data_from(load_calibration(options, tokenizer)), tokenizer


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
