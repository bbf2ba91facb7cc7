"""Trials: recipes to measure, several at a time, each kept as a row of a JSON file, so that none is run twice.

A trial is a recipe with a name and a seed. Where its values say "@NAME", the folder that the trial of that name and the
same seed leaves is put in its place, so that many can go on from one trained model. A row is known by a fingerprint of
all that decides it: the recipe, the trials that it goes on from, and the code of its steps (`code_version.py`).

Every trial is a process of its own, on cores of its own: with two jobs on two cores, each has one. Models of a few
million weights gain little from a second core, so two at a time are done sooner than two one after another; times are
to be compared only with times under the same conditions, which stand in the row. A trial that was killed goes on where
its last state was written, and one that fails does not keep others from being run.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from code_version import code_version
from provenance import provenance

from llmcompress.files import read_json, write_json
from llmcompress.safetensors_file import read_header

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "outputs" / "trials"
REFERENCE = re.compile(r"@([\w.-]+)")  # the whole of a value
PACKAGES = ("torch", "transformers")
LEFT_OUT = ("losses", "data")  # of a curve: long, and in the row already
PAUSE = 0.2  # seconds between two looks at the processes

Key = tuple[str, int]  # name and seed
Rows = dict[str, dict[str, Any]]  # name -> seed -> row


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to measure."""

    name: str
    seed: int
    values: Mapping[str, Any]  # of a recipe, or with `cache` of a KV cache, see `continuation.py`

    @property
    def key(self) -> Key:
        """What no other trial is called."""
        return self.name, self.seed

    @property
    def needs(self) -> list[Key]:
        """The trials whose folders it reads."""
        return [(name, self.seed) for name in dict.fromkeys(references(self.values))]

    @property
    def trainings(self) -> int:
        """How often it trains from early weights on: a lottery ticket does so once per round, and once before."""
        steps = self.values.get("steps", ())
        return 1 + sum(int(step["rounds"]) for step in steps if step.get("train") == "lottery_ticket")

    def command(self, recipe: Path, folder: Path) -> list[str]:
        """What measures it: the file of its values, and the folder to leave."""
        if "cache" in self.values:
            return [sys.executable, str(ROOT / "evals/continuation.py"), str(recipe), "--output", str(folder)]
        return [sys.executable, "-m", "llmcompress", "run", str(recipe), "--output", str(folder), "--overwrite"]


def references(values: Any) -> Iterator[str]:
    """Names of the trials that plain values name."""
    if isinstance(values, str):
        if found := REFERENCE.fullmatch(values):
            yield found[1]
    elif isinstance(values, Mapping | list):
        for each in values.values() if isinstance(values, Mapping) else values:
            yield from references(each)


def filled(values: Any, places: Mapping[str, str]) -> Any:
    """Plain values with something else for every name of a trial."""
    if isinstance(values, Mapping):
        return {key: filled(each, places) for key, each in values.items()}
    if isinstance(values, list):
        return [filled(each, places) for each in values]
    found = REFERENCE.fullmatch(values) if isinstance(values, str) else None
    return places[found[1]] if found else values


def seeded(values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A recipe's values with a seed for every step that draws anything."""
    from llmcompress.methods import METHODS
    from llmcompress.training import TRAININGS

    steps = []
    for step in values["steps"]:
        options = TRAININGS[step["train"]] if "train" in step else METHODS.get(step.get("method", ""))
        draws = options is not None and "seed" in options.model_fields
        steps.append(step | ({"seed": seed} if draws else {}))
    return dict(values) | {"steps": steps}


@dataclass(slots=True)
class Running:
    """A process that measures a trial."""

    trial: Trial
    process: "subprocess.Popen[bytes]"
    cores: frozenset[int]
    began: float


@dataclass
class Bench:
    """Trials, and the file of their rows."""

    trials: list[Trial]
    known_at: Path
    jobs: int = 2
    written: tuple[str, ...] = ()  # tracked files that a measurement changes, see `provenance`
    work: Path = WORK
    rows: Rows = field(init=False)

    def __post_init__(self) -> None:
        self.rows = read_json(self.known_at)
        self.by_key = {trial.key: trial for trial in self.trials}
        missing = [need for trial in self.trials for need in trial.needs if need not in self.by_key]
        if missing:
            raise SystemExit(f"{missing[0][0]}: another trial goes on from it, so it must be run too")

    @cached_property
    def fingerprints(self) -> dict[Key, str]:
        """Of every trial."""
        found: dict[Key, str] = {}

        def of(key: Key) -> str:
            if key not in found:
                trial = self.by_key[key]
                values = filled(trial.values, {name: of((name, seed)) for name, seed in trial.needs})
                text = json.dumps([values, trial.seed, code_version(trial.values)], sort_keys=True)
                found[key] = hashlib.sha256(text.encode()).hexdigest()
            return found[key]

        return {trial.key: of(trial.key) for trial in self.trials}

    def folder(self, trial: Trial) -> Path:
        """What it leaves; another one for another fingerprint."""
        return self.work / f"{trial.name}-{trial.seed}-{self.fingerprints[trial.key][:12]}"

    def known(self, trial: Trial) -> bool:
        """Whether its row is there, of the same recipe and code."""
        row = self.rows.get(trial.name, {}).get(str(trial.seed), {})
        return bool(row.get("fingerprint") == self.fingerprints[trial.key])

    def due(self) -> list[Trial]:
        """What is to be run: unknown rows, and known ones whose folder is needed for these and is gone."""
        wanted = {trial.key for trial in self.trials if not self.known(trial)}
        waiting = list(wanted)
        while waiting:
            for need in self.by_key[waiting.pop()].needs:
                if need not in wanted and not self.folder(self.by_key[need]).is_dir():
                    wanted.add(need)
                    waiting.append(need)
        return [trial for trial in self.trials if trial.key in wanted]

    def run(self) -> list[str]:
        """Run what is due; what went wrong, a line for each trial."""
        shares = core_shares(self.jobs)
        conditions = {"jobs": self.jobs, "threads": len(shares[0]), "versions": versions()}
        self.work.mkdir(parents=True, exist_ok=True)
        turn = Turn(self, provenance(*self.written) | conditions, self.due(), shares)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that what runs is ended too
        try:
            while turn.waiting or turn.running:
                turn.leave_out()
                turn.start()
                turn.collect()
                time.sleep(PAUSE)
        finally:
            stop(turn.running)
            signal.signal(signal.SIGTERM, before)
        return turn.wrong

    def start(self, trial: Trial, cores: frozenset[int]) -> Running:
        """Begin, or go on."""
        folder = self.folder(trial)
        recipe, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
        places = {name: str(self.folder(self.by_key[name, seed])) for name, seed in trial.needs}
        write_json(recipe, filled(trial.values, places))  # JSON is YAML
        if self.finished(folder):  # killed before its row was written
            command = [sys.executable, "-c", ""]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            command = trial.command(recipe, folder)
        variables = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "MKL_NUM_THREADS": str(len(cores))}
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=variables)
        with suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, cores)  # before it has made a thread
        return Running(trial, process, cores, time.monotonic())

    def finished(self, folder: Path) -> bool:
        """Whether a trial has left all of it."""
        return (folder / "results.json").is_file()

    def end(self, each: Running, machine: Mapping[str, Any]) -> str | None:
        """Keep the row of a process that has ended, or say what went wrong."""
        trial, folder = each.trial, self.folder(each.trial)
        if each.process.returncode or not self.finished(folder):
            log = folder.with_name(f"{folder.name}.log")
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
            return f"{trial.name}, seed {trial.seed}: exit code {each.process.returncode}, {log}: {last}"
        row = self.measured(trial, folder) | {"fingerprint": self.fingerprints[trial.key], "from": dict(machine)}
        rows = read_json(self.known_at)  # another process may have added to it
        rows.setdefault(trial.name, {})[str(trial.seed)] = row
        self.rows = {name: rows[name] for name in sorted(rows)}
        write_json(self.known_at, self.rows)
        if not any(trial.key in other.needs for other in self.trials):
            shutil.rmtree(folder)
        return None

    def measured(self, trial: Trial, folder: Path) -> dict[str, Any]:
        """The row of a trial that is done; tokens and seconds are with those of the model that it goes on from."""
        results = read_json(folder / "results.json")
        row = results["row"] if "row" in results else row_of(results, folder, trial.trainings)
        model = REFERENCE.fullmatch(trial.values["model"])
        if model:
            before = self.row(self.by_key[model[1], trial.seed])
            row |= {key: row[key] + before[key] for key in ("tokens", "seconds")}
        return row

    def row(self, trial: Trial) -> dict[str, Any]:
        """What is known of a trial."""
        found: dict[str, Any] = self.rows[trial.name][str(trial.seed)]
        return found


@dataclass
class Turn:
    """What is going on while a bench runs."""

    bench: Bench
    machine: Mapping[str, Any]  # what stands in every row
    waiting: list[Trial]
    free: list[frozenset[int]]  # cores that nobody uses
    running: list[Running] = field(default_factory=list)
    failed: set[Key] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.total, self.began = len(self.waiting), time.monotonic()

    def leave_out(self) -> None:
        """Trials that would go on from one that has failed."""
        for trial in [each for each in self.waiting if self.failed.intersection(each.needs)]:
            self.waiting.remove(trial)
            self.failed.add(trial.key)
            self.wrong.append(f"{trial.name}, seed {trial.seed}: not run, as what it goes on from has failed")

    def start(self) -> None:
        """As many as there are cores for, of those that have all that they go on from."""
        while self.free:
            pending = {trial.key for trial in [*self.waiting, *(each.trial for each in self.running)]}
            ready = [trial for trial in self.waiting if not pending.intersection(trial.needs)]
            if not ready:
                return
            self.waiting.remove(ready[0])
            self.running.append(self.bench.start(ready[0], self.free.pop(0)))

    def collect(self) -> None:
        """Rows of those that have ended."""
        for each in [each for each in self.running if each.process.poll() is not None]:
            self.running.remove(each)
            self.free.append(each.cores)
            problem = self.bench.end(each, self.machine)
            if problem:
                self.failed.add(each.trial.key)
                self.wrong.append(problem)
            self.tell(problem or f"{each.trial.name}, seed {each.trial.seed}: {short(self.bench.row(each.trial))}")

    def tell(self, text: str) -> None:
        """What has come of a trial, and how long the others will take."""
        done = self.total - len(self.waiting) - len(self.running)
        left = (time.monotonic() - self.began) / done * (self.total - done) / 60
        say(f"{text}; {done} of {self.total}, about {left:.0f} min left")


def versions() -> dict[str, str]:
    """Of the packages that compute; another one may change a number in its last digits, and masks with it."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def row_of(results: Mapping[str, Any], folder: Path, trainings: int) -> dict[str, Any]:
    """What the results of a run say; seconds are those of all steps, with what they load and choose.

    `training` has what each technique says of itself, such as the step of an Early-Bird ticket or the share of the
    gates that are closed; `runtime` the share that is left out and the bytes that a token reads, None without
    thresholds. The folder goes, so what is not in the row is lost.
    """
    curves, score = results["training"], results["scores"]["perplexity"][0]["compressed"]
    stored = results["base_model"]["parameters"]
    if results["format"] == "dense":
        shapes = [info.shape for file in folder.glob("*.safetensors") for info in read_header(file).values()]
        stored = sum(prod(shape) for shape in shapes)
    learning = sum(curve["seconds"] for curve in curves)  # also of a run that was killed in between
    return {
        "perplexity": score["value"],
        "nll": score["nll"],
        "parameters": stored,
        "zeros": (results["sparsity"] or {}).get("of_decoder_linears", 0.0),
        "bytes": results["size"]["after_bytes"],
        "tokens": sum(curve["tokens"] for curve in curves),
        "seconds": max(results["timing"]["stages"]["compress"], learning),
        "trainings": trainings,
        "data": (results["calibration"] or {}).get("sha256"),
        "training": [{key: curve[key] for key in curve if key not in LEFT_OUT} for curve in curves],
        "runtime": results["runtime"],
    }


def core_shares(jobs: int) -> list[frozenset[int]]:
    """The cores that this process may use, dealt out to jobs evenly; those left over are not used."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // jobs
    if each == 0:
        raise SystemExit(f"--jobs {jobs}: there are {len(cores)} cores; use at most that many jobs")
    return [frozenset(cores[i * each : (i + 1) * each]) for i in range(jobs)]


def stop(running: Iterable[Running]) -> None:
    """End processes that are still at work; they go on from their last state the next time."""
    for each in running:
        each.process.terminate()
    for each in running:
        each.process.wait()


def short(row: Mapping[str, Any]) -> str:
    """A row in a few words."""
    return f"perplexity {row['perplexity']:.2f}, {row['seconds']:.0f} s"


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)
