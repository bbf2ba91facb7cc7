"""A run: recipe in, finished folder out. The only file that sees source, stream, methods, formats and report together.

    source -> plan -> checks -> calibration -> blocks, one after another -> what is outside the blocks
           -> proof of loading -> scores -> card and report -> final name -> Hub

Until the last rename everything lives in DIR.partial; a killed run continues from its last finished block.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress import plan as planning
from llmcompress.arch import discover, match_names, quiet_transformers, skeleton
from llmcompress.calibrate import load_calibration
from llmcompress.checkpoint import Checkpoint, read_json, replacing, write_json
from llmcompress.compress import BlockCompressor, BlockResult
from llmcompress.engines import verdicts
from llmcompress.errors import PlanError, ResumeError
from llmcompress.fused import fuse
from llmcompress.plan import Plan, check_machine, device_of, make_plan
from llmcompress.progress import Progress, Silent, staged
from llmcompress.proof import positions, prove, write_expected
from llmcompress.recipe import Recipe
from llmcompress.report import write_report
from llmcompress.source import ModelSource, open_source
from llmcompress.stream import StreamedModel, stream_blocks

PACKAGES = ("llmcompress", "torch", "transformers", "compressed-tensors", "tokenizers", "safetensors", "lm_eval")
COMPUTING = PACKAGES[:5]   # those whose version can change the bytes of a result
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
                   "*.tiktoken", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*")


@dataclass(frozen=True, slots=True)
class Data:
    """Tokens that go through the blocks, [samples, length] int64, and where they are from."""

    tokens: Tensor
    record: dict[str, Any] | None   # None: random tokens, which only prove the result


def run(
    recipe: Recipe, output: Path, *, overwrite: bool = False, evaluate: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Carry out a recipe; the finished folder is `output`. Returns the contents of its results.json.

    Continues a killed run of the same recipe. evaluate=False skips the recipe's scores.
    Raises a subclass of LLMCompressError for everything the user can mend; then nothing has the name `output`.
    """
    progress, clock = progress or Silent(), Clock()
    if output.exists() and not overwrite:
        raise ResumeError(f"{output}: exists; give --overwrite to replace it when the run is done, or another --output")
    with clock.stage("source"):
        plan, source = prepare(recipe, output, progress)
    with clock.stage("calibrate"):
        progress.stage("calibrating", 1)
        data, tokenizer = load_data(plan)
    job = Job(plan, source, data, tokenizer, output, progress)
    checkpoint = job.open(overwrite=overwrite)
    with clock.stage("compress"):
        layers, notes = job.compress(checkpoint)
    peak = peak_bytes()
    with clock.stage("prove"):
        progress.stage("proving that it loads", 1)
        proof = prove(checkpoint.partial, checkpoint.state / "expected", dtype=plan.dtype, blocks=plan.count)
    with clock.stage("evaluate"):
        scores = job.scores(checkpoint.partial) if evaluate and recipe.evaluate else None
    results = job.results(checkpoint, layers, notes, proof, scores, clock, peak)
    write_json(checkpoint.partial / "results.json", results)
    write_json(checkpoint.partial / "llmcompress.json", manifest(results, checkpoint))
    write_report(checkpoint.partial)
    checkpoint.complete(overwrite=overwrite)
    if recipe.publish:
        publish(recipe, output, progress)
    return results


def prepare(recipe: Recipe, output: Path, progress: Progress) -> tuple[Plan, ModelSource]:
    """Everything that can fail without a weight: source, plan, machine, rights on the Hub, the suite. Then fetch."""
    source = open_source(recipe.model, revision=recipe.revision)
    plan = make_plan(recipe, source)
    check_machine(plan, output)
    if recipe.evaluate:
        from llmcompress.suite import load_suite

        load_suite(recipe.evaluate.suite)
    if recipe.publish:
        from llmcompress.hub import check_rights

        check_rights(recipe.publish.repo_id, private=recipe.publish.private)
    for text in plan.notes:
        progress.note(text)
    progress.stage("fetching the model", max(1, source.fetch_bytes))
    return plan, source.fetch(lambda done, total: progress.advance(done))


def load_data(plan: Plan) -> tuple[Data, Any]:
    """Calibration tokens, or for data-free methods a few random ones for the proof; and the tokenizer."""
    from transformers import AutoTokenizer

    source = plan.source.fetch()
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=plan.recipe.trust_remote_code
        )
    options = plan.recipe.calibration
    if not plan.needs_data or options is None:
        random = torch.Generator().manual_seed(0)
        shape = (planning.PROOF_SAMPLES, planning.PROOF_LENGTH)
        return Data(torch.randint(len(tokenizer), shape, generator=random), None), tokenizer
    found = load_calibration(options, tokenizer)
    record = {
        "sources": found.sources, "samples": len(found.tokens), "length": found.tokens.shape[1],
        "tokens": found.tokens.numel(), "sha256": found.sha256,
    }
    return Data(found.tokens, record), tokenizer


class Job:
    """One run whose plan, model and data are at hand."""

    def __init__(
        self, plan: Plan, source: ModelSource, data: Data, tokenizer: Any, output: Path, progress: Progress
    ) -> None:
        from transformers import AutoConfig

        self.plan, self.source, self.data, self.tokenizer = plan, source, data, tokenizer
        self.output, self.progress = output, progress
        trust = plan.recipe.trust_remote_code
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=trust)
        self.model = skeleton(config, plan.dtype, trust_remote_code=trust)
        self.architecture = discover(self.model)
        self.stored = match_names(self.model, source.tensors)
        self._check_against_plan()
        device = device_of(plan.recipe)
        self.stream = StreamedModel(self.model, self.architecture, self._read, dtype=plan.dtype, device=device)
        self.outside = self._outside_shards()

    def open(self, *, overwrite: bool) -> Checkpoint:
        """The folder that is being written."""
        checkpoint = Checkpoint(self.output, self.plan.count + len(self.outside), self.fingerprint())
        checkpoint.open(overwrite=overwrite)
        return checkpoint

    def fingerprint(self) -> str:
        """sha256 over all that decides the bytes of the result: model, tokens, recipe and versions."""
        recipe = self.plan.recipe.plain()
        for key in ("evaluate", "publish", "max_memory"):
            recipe.pop(key, None)
        parts = {
            "model": self.source.fingerprint, "recipe": recipe, "format": self.plan.format_name,
            "tokens": hashlib.sha256(self.data.tokens.numpy().tobytes()).hexdigest(),
            "versions": {name: version(name) for name in COMPUTING},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def compress(self, checkpoint: Checkpoint) -> tuple[list[dict[str, Any]], list[str]]:
        """All blocks, then all else; rows of results.json and notes."""
        done = len(checkpoint.records())
        self.progress.stage("compressing", self.plan.count)
        compressor = BlockCompressor(self.plan, self.architecture, self.stored)
        if done:
            self.progress.note(f"continuing after block {done - 1}")
            self.stream.prepare(self.data.tokens)
            hidden = checkpoint.hidden(done)
        else:
            hidden = self.stream.embed(self.data.tokens)
        pending: tuple[int, BlockResult, float] | None = None
        start = time.monotonic()
        for block in stream_blocks(self.stream, hidden, done):
            if pending:   # its outputs are in `hidden` only now that the stream has replayed it
                self._finish(checkpoint, hidden, *pending)
            self.progress.advance(block.index, block.name)
            result = compressor(block)
            self._write_block(checkpoint, block.index, result)
            pending, start = (block.index, result, start), time.monotonic()
        if pending:
            self._finish(checkpoint, hidden, *pending)
        self.progress.advance(self.plan.count)
        self._write_outside(checkpoint)
        records = checkpoint.records()
        self._write_expected(checkpoint, hidden, records)
        self._write_small_files(checkpoint, records)
        return [row for record in records for row in record["layers"]], [n for record in records for n in record["notes"]]

    def _finish(self, checkpoint: Checkpoint, hidden: Tensor, index: int, result: BlockResult, start: float) -> None:
        record = {
            "layers": result.layers, "notes": result.notes, "digests": result.digests,
            "seconds": time.monotonic() - start, "peak_bytes": peak_bytes(),
        }
        checkpoint.finish_block(index, hidden, record)

    def _write_block(self, checkpoint: Checkpoint, index: int, result: BlockResult) -> None:
        """The block's shard: packed linears, and everything else of the block as it is now."""
        module, name = self.stream.blocks[index], self.architecture.block(index)
        done = {row["name"] + ".weight" for row in result.layers}
        tensors = dict(result.tensors)
        for parameter, value in module.named_parameters():
            sources = self.stored[f"{name}.{parameter}"]
            if len(sources) == 1 and sources[0] not in done and tuple(value.shape) == self.source.tensors[sources[0]].shape:
                tensors[sources[0]] = value.to(self.plan.dtype)
                done.add(sources[0])
        rest = [info.name for info in self.plan.tensors_of(index) if info.name not in done]
        checkpoint.write_shard(index, tensors | self._as_stored(rest))

    def _write_outside(self, checkpoint: Checkpoint) -> None:
        """Shards of the tensors outside the blocks, one at a time."""
        for number, names in enumerate(self.outside, self.plan.count):
            checkpoint.write_shard(number, self._as_stored(names))

    def _as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as the checkpoint has them: those of parameters in the recipe's dtype, others (old buffers) untouched."""
        parameters = {tensor for sources in self.stored.values() for tensor in sources}
        tensors: dict[str, Tensor] = {}
        for name in names:
            dtype = self.plan.dtype if name in parameters else TORCH_DTYPES.get(self.source.tensors[name].dtype)
            tensors |= self.source.load([name], dtype=dtype or torch.float32)
        return tensors

    def _outside_shards(self) -> list[list[str]]:
        """Names of the tensors outside the blocks, in shards of at most a gibibyte or one tensor."""
        shards: list[list[str]] = []
        size = 0
        for info in self.plan.tensors_of(None):
            if not shards or size + info.bytes > 2**30:
                shards.append([])
                size = 0
            shards[-1].append(info.name)
            size += info.bytes
        return shards

    def _write_expected(self, checkpoint: Checkpoint, hidden: Tensor, records: list[dict[str, Any]]) -> None:
        """Logits that the reloaded model must reproduce."""
        at = positions(hidden.shape[1])
        logits = torch.cat([self.stream.logits(row[None])[:, at] for row in hidden[: planning.PROOF_SAMPLES]])
        digests = {name: value for record in records for name, value in record["digests"].items()}
        tokens = self.data.tokens[: planning.PROOF_SAMPLES]
        write_expected(checkpoint.state / "expected", tokens, at, logits, digests)

    def _write_small_files(self, checkpoint: Checkpoint, records: list[dict[str, Any]]) -> None:
        """Config, index, tokenizer and recipe."""
        import yaml

        folder = self.source.folder
        for pattern in TOKENIZER_FILES:
            for path in sorted(folder.glob(pattern)) if folder else ():
                if path.is_file() and not path.name.endswith((".safetensors", ".gguf")):
                    shutil.copyfile(path, checkpoint.partial / path.name)
        write_json(checkpoint.partial / "config.json", self._config(records))
        checkpoint.write_index({})
        with replacing(checkpoint.partial / "recipe.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(self.plan.recipe.plain(), sort_keys=False), encoding="utf-8")

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The model's config.json with its new dtype and, for packed formats, the quantization block."""
        config = read_json(self.source.folder / "config.json") if self.source.folder else {}
        config.pop("torch_dtype", None)
        config["dtype"] = self.plan.recipe.dtype
        rows = [row["name"] for record in records for row in record["layers"]]
        methods = {name: step.method for name in rows if (step := self.plan.step_of(name))}
        quantization = self.plan.format.config(methods, self._ignored(set(rows)))
        return config | ({"quantization_config": quantization} if quantization else {})

    def _ignored(self, compressed: set[str]) -> list[str]:
        """Checkpoint names of all linears that stay as they are, the output head included."""
        names = []
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                stored = self.stored.get(f"{name}.weight", [f"{name}.weight"])[0].removesuffix(".weight")
                names += [stored] if stored not in compressed else []
        return names

    def scores(self, folder: Path) -> dict[str, Any]:
        """The recipe's suite on the reloaded result and on the base model."""
        from llmcompress.evaluate import evaluate
        from llmcompress.suite import load_suite

        assert self.plan.recipe.evaluate is not None
        suite = load_suite(self.plan.recipe.evaluate.suite)
        return evaluate(
            folder, suite, base=self.source.folder, base_fingerprint=self.source.fingerprint,
            trust_remote_code=self.plan.recipe.trust_remote_code, progress=staged(self.progress),
        )

    def results(
        self, checkpoint: Checkpoint, layers: list[dict[str, Any]], notes: list[str], proof: dict[str, Any],
        scores: dict[str, Any] | None, clock: "Clock", peak: int,
    ) -> dict[str, Any]:
        """Everything that the card and the report may show."""
        plan, source = self.plan, self.source
        config = read_json(checkpoint.partial / "config.json")
        records = checkpoint.records()
        output = sum(path.stat().st_size for path in checkpoint.partial.glob("*.safetensors"))
        compress_seconds = sum(record["seconds"] for record in records)
        stages = clock.stages | {"compress": max(clock.stages["compress"], compress_seconds)}
        measured = {
            "peak_host_bytes": max([peak, *(record["peak_bytes"] for record in records)]),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "disk_bytes": disk_bytes(checkpoint.partial) + source.fetch_bytes,
            "output_bytes": output,
            "seconds": sum(stages[name] for name in ("source", "calibrate", "compress")),
        }
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "schema": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "name": self.output.name,
            "base_model": {
                "id": source.name, "hub_id": source.hub_id, "revision": source.revision, "license": source.license,
                "model_type": config.get("model_type"), "parameters": parameters,
            },
            "recipe": plan.recipe.plain(),
            "format": plan.format_name,
            "calibration": self.data.record,
            "size": {
                "before_bytes": plan.before_bytes, "after_bytes": output, "ratio": output / plan.before_bytes,
                "parts": parts(plan, layers),
            },
            "layers": layers,
            "kept": [{"name": name, "reason": reason} for name, reason in plan.kept.items()],
            "notes": list(dict.fromkeys(plan.notes + notes)),
            "plan": {"predicted": asdict(plan.predicted), "measured": measured},
            "timing": {"total_seconds": sum(stages.values()), "stages": stages},
            "proof": proof,
            "engines": verdicts(config),
            "scores": scores,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "machine": machine(),
        }

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by their names in the model."""
        sources = {name: self.stored[name] for name in names}
        tensors = self.source.load({t for found in sources.values() for t in found}, dtype=self.plan.dtype)
        shapes = {name: tuple(self.model.get_parameter(name).shape) for name in sources}
        return {
            name: tensors[found[0]] if tuple(tensors[found[0]].shape) == shapes[name]
            else fuse(self.model, name, {tensor: tensors[tensor] for tensor in found})
            for name, found in sources.items()
        }

    def _check_against_plan(self) -> None:
        """The plan saw names and shapes; the modules must agree, or something would be skipped."""
        kept = self.plan.kept
        planned = {linear.name: linear.shape for linear in self.plan.linears if linear.step is not None}
        found = {}
        for index in range(self.architecture.count):
            for name, linear in self.architecture.linears.items():
                stored = self.stored[f"{self.architecture.block(index)}.{name}.weight"][0].removesuffix(".weight")
                found |= {} if stored in kept else {stored: (linear.out_features, linear.in_features)}
        transposed = any(linear.transposed for linear in self.architecture.linears.values())
        if planned != found or transposed != self.plan.transposed:
            odd = sorted(set(planned.items()) ^ set(found.items()))[:3]
            raise PlanError(
                f"{self.source.name}: the model's linears are not the matrices of its checkpoint (such as {odd}); "
                f"{type(self.model).__name__} is not supported"
            )


def manifest(results: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """llmcompress.json: what made the folder, for `inspect` and for anyone who wants to make it again."""
    keys = ("schema", "created", "name", "base_model", "recipe", "format", "calibration", "layers", "kept", "notes",
            "plan", "proof", "engines", "versions", "machine")
    return {"fingerprint": checkpoint.fingerprint} | {key: results[key] for key in keys}


def publish(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Push the finished folder where the recipe says."""
    from llmcompress.hub import push

    assert recipe.publish is not None
    progress.stage("publishing", 1)
    progress.note("published: " + push(folder, recipe.publish.repo_id, private=recipe.publish.private))


# --- measuring -------------------------------------------------------------------------------------------------------

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
PARTS = (("attention", ("attn", "attention")), ("mlp", ("mlp", "fc1", "fc2", "ffn")), ("embeddings", ("emb", "wte", "wpe", "lm_head")),
         ("norms", ("norm", "ln_")))


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.monotonic()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - start


def parts(plan: Plan, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes before and after by part of the model."""
    after = {row["name"] + ".weight": row["after_bytes"] for row in layers}
    sizes: dict[str, list[int]] = {}
    for info in plan.source.tensors.values():
        dense = planning.numel(info) * plan.dtype.itemsize
        size = sizes.setdefault(part_of(info.name), [0, 0])
        size[0] += dense
        size[1] += after.get(info.name, dense)
    return [{"part": name, "before_bytes": before, "after_bytes": now} for name, (before, now) in sizes.items()]


def part_of(tensor: str) -> str:
    """Which part of a model a tensor belongs to, by its name; norms first, as they sit inside the others."""
    for name, marks in (PARTS[3], *PARTS[:3]):
        if any(mark in tensor for mark in marks):
            return name
    return "other"


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine that the measurements are from."""
    import psutil

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total, "gpu": gpu}


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
