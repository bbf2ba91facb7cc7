"""lm-eval tasks, item by item, so that two models can be compared on the same items.

An accuracy of 0.42 +- 0.03 beside 0.40 +- 0.03 looks like no difference; but both models answered the same items, and
if they disagree on only a few, the difference is known far better than either score. So every score keeps its value
per item with a hash of the item, and differences and ratios get paired standard errors.

`limit` takes items evenly spaced over the task, not the first ones: HellaSwag, for one, is sorted by source. It is a
fixed choice, so every model meets the same items.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmcompress.errors import EvaluationError
from llmcompress.offline_tasks import OFFLINE_TASKS, lm_eval_tasks, write_task
from llmcompress.perplexity import Progress, mean_stderr
from llmcompress.quiet import Quiet, quiet
from llmcompress.suite import TaskEntry

SEED = 1234  # of few-shot sampling and anything else that lm-eval draws


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One model on one task."""

    name: str  # the entry's name
    task: str  # lm-eval's name
    metric: str  # "acc", or "metric,filter" where lm-eval post-processes answers
    fewshot: int
    value: float
    stderr: float | None  # None where the score is not a mean over items
    hashes: list[str]  # of each item and its prompt
    items: list[float]  # the metric of each item; empty where it has no number per item


def run_tasks(
    model: Any, tokenizer: Any, entries: list[TaskEntry], *, batch_size: int, progress: Progress | None = None
) -> list[TaskScore]:
    """Score `model` on every entry; a group of tasks gives one score per member.

    Raises EvaluationError for an unknown task, and for one whose data set cannot be downloaded.
    """
    scores = []
    with quiet() as stderr:
        for entry in entries:
            tasks = load_tasks(entry)
            lm = _language_model(model, tokenizer, batch_size, stderr, partial(progress or _ignore, entry.name))
            results = _simple_evaluate(lm, entry, tasks)
            scores += [_score(entry, name, results, alone=len(tasks) == 1) for name in tasks]
    return scores


def load_tasks(entry: TaskEntry) -> dict[str, Any]:
    """The lm-eval task objects that `entry.task` names, by lm-eval name, with their data."""
    from datasets.exceptions import DatasetNotFoundError
    from lm_eval.tasks import TaskManager

    path = _task_file(entry.task)
    manager = TaskManager(include_defaults=path is None)  # indexing all stock tasks takes many seconds
    if path is None and entry.task not in manager.all_tasks:
        close = difflib.get_close_matches(entry.task, [*OFFLINE_TASKS, *manager.all_tasks], n=4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise EvaluationError(f"task {entry.task!r}: neither an offline task nor one of lm-eval's{hint}")
    try:
        return dict(manager.load([str(path or entry.task)])["tasks"])
    except (OSError, DatasetNotFoundError) as exc:
        raise EvaluationError(
            f"task {entry.task!r}: its data set could not be fetched from the Hub ({exc}); "
            f"check the network, or take the suite `quick` or one of {', '.join(OFFLINE_TASKS)}, which work offline"
        ) from exc


def _task_file(task: str) -> Path | None:
    """The YAML of an offline task, of a file the user names, or of a stock task whose file has the task's name."""
    if task in OFFLINE_TASKS:
        return write_task(task)
    if task.endswith((".yaml", ".yml")):
        if not Path(task).is_file():
            raise EvaluationError(f"task {task!r}: no such file")
        return Path(task).resolve()
    return next((path for path in sorted(lm_eval_tasks().glob(f"*/{task}.yaml")) if _defines(path, task)), None)


def _defines(path: Path, task: str) -> bool:
    """Whether a stock YAML defines the task of this very name (and is no template or group)."""
    return f"task: {task}" in path.read_text(encoding="utf-8").splitlines()


def _simple_evaluate(lm: Any, entry: TaskEntry, tasks: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results with every item logged."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    samples = {name: spaced(len(task.eval_docs), entry.limit) for name, task in tasks.items()} if entry.limit else None
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks.values()),
        num_fewshot=entry.fewshot,
        samples=samples,
        log_samples=True,
        task_manager=TaskManager(include_defaults=False),  # the tasks are loaded; else it indexes all of its own
        bootstrap_iters=0,  # a mean over items has a closed form; bootstrapping forks processes and prints to stdout
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    return results


def spaced(total: int, limit: int) -> list[int]:
    """`limit` of the numbers 0 .. total - 1, in order and evenly spaced; all of them if there are no more."""
    return [i * total // limit for i in range(limit)] if limit < total else list(range(total))


def _ignore(name: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _language_model(
    model: Any, tokenizer: Any, batch_size: int, stderr: Quiet, report: Callable[[int, int], None]
) -> Any:
    """lm-eval's wrapper of a loaded model, without bars of its own and with probabilities in float32.

    In bfloat16 a log-probability near -8 would have steps of 1/32, and the choices of an item would tie.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc]  # untyped library
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            self.done, self.total = 0, len(requests)
            with stderr.loud():
                answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
                report(self.total, self.total)  # requests with a common context share a row, so fewer were seen
            return answers

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *args, **options)
            self.done = min(self.done + len(inps), self.total)
            report(self.done, self.total)
            return logits

        done = total = 0

    return Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def _score(entry: TaskEntry, task: str, results: dict[str, Any], *, alone: bool) -> TaskScore:
    """One task's row out of lm-eval's results; `alone`: the entry names this task only, so its name applies."""
    numbers = {key.removesuffix(",none"): v for key, v in results["results"][task].items() if isinstance(v, float)}
    metric = entry.metric or ("acc" if "acc" in numbers else next(iter(numbers), ""))
    if metric not in numbers:
        raise EvaluationError(f"task {entry.task!r}: no metric {metric!r}; it has {', '.join(numbers) or 'none'}")
    name, _, wanted_filter = metric.partition(",")
    samples = [s for s in results["samples"][task] if s["filter"] == (wanted_filter or "none")]
    samples.sort(key=lambda s: s["doc_id"])
    items = [float(s[name]) for s in samples if isinstance(s.get(name), int | float)]
    mean, stderr = mean_stderr(items) if items else (math.nan, None)
    if not math.isclose(mean, numbers[metric], rel_tol=1e-6, abs_tol=1e-9):
        items, stderr = [], None  # an aggregate such as F1 or perplexity, not a mean over items
    return TaskScore(
        name=entry.name if alone else task,
        task=task,
        metric=metric,
        fewshot=int(results["n-shot"][task]),
        value=float(numbers[metric]),
        stderr=stderr,
        hashes=[s["doc_hash"][:16] + s["prompt_hash"][:16] for s in samples],
        items=items,
    )


def compare_task(entry: TaskEntry | None, compressed: TaskScore, base: TaskScore | None) -> dict[str, Any]:
    """The row of `scores.tasks`: both scores, their difference and recovery with paired standard errors.

    entry: where the chance level stands; None for a member of a group, whose chance is unknown.
    Raises EvaluationError unless both models answered the same items under the same metric.
    """
    chance = entry.chance if entry else None
    row: dict[str, Any] = {
        "name": compressed.name, "task": compressed.task, "metric": compressed.metric,
        "items": len(compressed.hashes), "fewshot": compressed.fewshot, "chance": chance,
        "base": None, "compressed": {"value": compressed.value, "stderr": compressed.stderr},
        "difference": None, "difference_stderr": None, "recovery": None, "recovery_stderr": None,
    }  # fmt: skip
    if base is None:
        return row
    if (base.hashes, base.metric, base.fewshot) != (compressed.hashes, compressed.metric, compressed.fewshot):
        raise EvaluationError(
            f"task {compressed.task!r}: the two models were not asked the same items ({len(base.hashes)} and "
            f"{len(compressed.hashes)}); their scores cannot be compared; score the base model again"
        )
    row["base"] = {"value": base.value, "stderr": base.stderr}
    row["difference"] = compressed.value - base.value
    row["difference_stderr"] = _paired_stderr(compressed, base, 1.0)
    if chance is not None and base.value - 2 * (base.stderr or 0.0) > chance:
        row["recovery"] = ratio = compressed.value / base.value
        error = _paired_stderr(compressed, base, ratio)
        row["recovery_stderr"] = None if error is None else error / base.value
    return row


def _paired_stderr(compressed: TaskScore, base: TaskScore, factor: float) -> float | None:
    """Standard error of the mean over items of compressed - factor * base; None without values per item.

    With factor 1 this is the error of the difference; with the ratio r of the means, divided by the base's mean, it is
    the error of r to first order (delta method), covariance included.
    """
    if not compressed.items or not base.items:
        return None
    return mean_stderr([c - factor * b for c, b in zip(compressed.items, base.items, strict=True)])[1]
