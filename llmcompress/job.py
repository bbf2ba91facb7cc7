"""One run whose plan, model and data are at hand: blocks through the compressor, and every file of the folder.

embedding -> block 0 -> block 1 -> ... -> what is outside the blocks -> what the reload must reproduce -> small files
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress import cost
from llmcompress.arch import ignored_linears, match_names
from llmcompress.building import Built, build
from llmcompress.calibrate import Calibration
from llmcompress.checkpoint import (
    Checkpoint,
    read_tensors,
    write_tensors,
)
from llmcompress.compress import BlockCompressor, BlockResult
from llmcompress.errors import PlanError
from llmcompress.files import read_json, write_json, write_text
from llmcompress.fused import fuse
from llmcompress.plan import Plan
from llmcompress.progress import Progress, staged
from llmcompress.proof import digest, positions, proof_blocks, write_expected
from llmcompress.results import PACKAGES, Origin, peak_bytes, version
from llmcompress.source import CODE, ModelSource
from llmcompress.stream import Block, StreamedModel, stream_blocks
from llmcompress.survey import Survey

COMPUTING = PACKAGES[:5]  # those whose version can change the bytes of a result

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True, slots=True)
class Data:
    """Tokens that go through the blocks, [samples, length] int64, and where they are from."""

    tokens: Tensor
    record: dict[str, Any] | None  # None: random tokens, which only prove the result


def data_from(found: Calibration) -> Data:
    """Tokens of calibration or training, and what is said of them in results.json."""
    record = {
        "sources": found.sources,
        "samples": len(found.tokens),
        "length": found.tokens.shape[1],
        "tokens": found.tokens.numel(),
        "sha256": found.sha256,
    }
    return Data(found.tokens, record)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all stages of a run have in common."""

    origin: Origin
    data: Data
    tokenizer: Any
    progress: Progress


def build_for(plan: Plan, dtype: torch.dtype | None = None, source: ModelSource | None = None) -> Built:
    """The model of a plan without its weights; dtype and source: if not the recipe's and the plan's."""
    return build(source or plan.source, dtype or plan.dtype, trust_remote_code=plan.recipe.trust_remote_code)


def tensors_by_parameter(
    model: Any, source: ModelSource, stored: dict[str, list[str]], dtype: torch.dtype
) -> Callable[[Iterable[str]], dict[str, Tensor]]:
    """A function from names of parameters to their tensors, out of a checkpoint that may name or split them otherwise.

    stored: parameter name -> its tensors in the checkpoint.
    """

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        sources = {name: stored[name] for name in names}
        tensors = source.load({t for found in sources.values() for t in found}, dtype=dtype)
        shapes = {name: tuple(model.get_parameter(name).shape) for name in sources}
        return {
            name: tensors[found[0]]
            if tuple(tensors[found[0]].shape) == shapes[name]
            else fuse(model, name, {tensor: tensors[tensor] for tensor in found})
            for name, found in sources.items()
        }

    return read


class Job:
    """One run whose plan, model and data are at hand."""

    def __init__(
        self, plan: Plan, source: ModelSource, shared: Shared, output: Path, built: Built | None = None
    ) -> None:
        self.plan, self.source, self.shared, self.output = plan, source, shared, output
        self.data, self.progress = shared.data, shared.progress
        self.model, self.architecture = built or build_for(plan)
        self.stored = match_names(self.model, source.tensors)
        self._check_against_plan()
        device = plan.device
        self.stream = StreamedModel(self.model, self.architecture, self._read, dtype=plan.dtype, device=device)
        self.outside = self._outside_shards()
        self.proof_blocks = proof_blocks(plan)
        self.adapter: dict[str, Tensor] = {}  # LoRA matrices beside the weights, by peft's names

    def open(self, *, overwrite: bool) -> Checkpoint:
        """The folder that is being written."""
        checkpoint = Checkpoint(self.output, self.block_shards + len(self.outside), self.fingerprint())
        checkpoint.open(overwrite=overwrite, details={"proof_blocks": self.proof_blocks})
        self.proof_blocks = checkpoint.details.get("proof_blocks", self.proof_blocks)  # free memory may have changed
        return checkpoint

    @property
    def block_shards(self) -> int:
        """How many blocks the result has; each is a shard."""
        return self.plan.count

    def fingerprint(self) -> str:
        """sha256 over all that decides the bytes of the result: model, tokens, recipe and versions."""
        recipe = self.plan.recipe.plain()
        for key in ("evaluate", "publish", "max_memory"):
            recipe.pop(key, None)
        parts = {
            "model": self.source.fingerprint,
            "recipe": recipe,
            "format": self.plan.format_name,
            "device": self.plan.device.type,
            "tokens": hashlib.sha256(self.data.tokens.numpy().tobytes()).hexdigest(),
            "versions": {name: version(name) for name in COMPUTING},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def compress(self, checkpoint: Checkpoint) -> None:
        """All blocks, then all else."""
        survey = Survey(self.plan, self.architecture, self.stored, checkpoint.state)
        self.plan = self.plan.with_sparsities(survey.run(self.stream, self._exact, self.data.tokens, self.progress))
        self._stream_through(checkpoint, BlockCompressor(self.plan, self.architecture, self.stored, survey.gradients))

    def _stream_through(self, checkpoint: Checkpoint, work: Callable[[Block], BlockResult]) -> None:
        """Let `work` change one block after another, each fed by those before it; then write all else."""
        done = len(checkpoint.records())
        self.progress.stage("compressing", self.plan.count)
        if done:
            self.progress.note(f"continuing after block {done - 1}")
            self.stream.prepare(self.data.tokens)
            hidden = checkpoint.hidden(done)
        else:
            hidden = self.stream.embed(self.data.tokens)
        pending: tuple[int, BlockResult] | None = None
        self.lap = time.monotonic()
        for block in stream_blocks(self.stream, hidden, done):
            if pending:  # its outputs are in `hidden` only now that the stream has replayed it
                self._finish(checkpoint, hidden, *pending)
            self.progress.advance(block.index, block.name)
            result = work(block)
            self._write_block(checkpoint, block.index, result)
            pending = (block.index, result)
        if pending:
            self._finish(checkpoint, hidden, *pending)
        self.progress.advance(self.plan.count)
        self._write_rest(checkpoint)

    def _write_rest(self, checkpoint: Checkpoint) -> None:
        """What is outside the blocks, what the reloaded model must reproduce, and small files."""
        self._write_outside(checkpoint)
        records = checkpoint.records()
        self._write_expected(checkpoint, records)
        self._write_small_files(checkpoint, records)

    def _exact(self) -> StreamedModel:
        """A stream of the dense model in float32, of a skeleton of its own: this one's must stay as it is."""
        model, architecture = build_for(self.plan, torch.float32)
        return StreamedModel(model, architecture, self._read, dtype=torch.float32, device=self.plan.device)

    def _finish(self, checkpoint: Checkpoint, hidden: Tensor, index: int, result: BlockResult) -> None:
        start, self.lap = self.lap, time.monotonic()
        record = {
            "layers": result.layers,
            "notes": result.notes,
            "digests": result.digests,
            "seconds": self.lap - start,
            "peak_bytes": peak_bytes(),
        }
        if index == self.proof_blocks - 1:
            write_tensors(checkpoint.state / "proof.safetensors", {"hidden": hidden[: cost.PROOF_SAMPLES].clone()})
        checkpoint.finish_block(index, hidden, record)

    def _write_block(self, checkpoint: Checkpoint, index: int, result: BlockResult) -> None:
        """The block's shard: packed linears, and everything else of the block as it is now."""
        module, name = self.stream.blocks[index], self.architecture.block(index)
        done = {row["name"] + ".weight" for row in result.layers} | set(result.tensors) | result.gone
        tensors = dict(result.tensors)
        for parameter, value in module.named_parameters():
            sources = self.stored[f"{name}.{parameter}"]
            if (
                len(sources) == 1
                and sources[0] not in done
                and tuple(value.shape) == self.source.tensors[sources[0]].shape
            ):
                tensors[sources[0]] = value.to(self.plan.dtype)
                done.add(sources[0])
        rest = [info.name for info in self.plan.tensors_of(index) if info.name not in done]
        checkpoint.write_shard(index, tensors | self._as_stored(rest))

    def _carry_over(self, checkpoint: Checkpoint, numbers: list[int]) -> None:
        """Put these blocks into the folder, one after another, with the tensors that `_as_stored` gives for them.

        Only the samples of the proof go through them. Continues after the blocks that are there already.
        """
        self.progress.stage("writing the blocks", len(numbers))
        done = len(checkpoint.records())
        hidden = self.stream.embed(self.data.tokens[: cost.PROOF_SAMPLES])  # also learns what blocks are called with
        hidden = checkpoint.hidden(done) if done else hidden
        for new, old in list(enumerate(numbers))[done:]:
            start, block = time.monotonic(), self.stream.load_block(old, hidden)
            for rows in block.batches():
                hidden[rows] = block.forward(rows).to(hidden.device)
            name = self.architecture.block(new)
            linears = {linear: block.module.get_submodule(linear) for linear in self.architecture.at(old).linears}
            left = {key: self._left(f"{name}.{key}.weight", module.weight) for key, module in linears.items()}
            digests = {f"{name}.{linear}": digest(weight) for linear, weight in left.items()}
            self.stream.free_block(old)
            before, after = (f"{self.plan.blocks}.{number}." for number in (old, new))
            tensors = self._as_stored([info.name for info in self.plan.tensors_of(old)])
            checkpoint.write_shard(new, {after + key.removeprefix(before): value for key, value in tensors.items()})
            if new == self.proof_blocks - 1:
                write_tensors(checkpoint.state / "proof.safetensors", {"hidden": hidden.clone()})
            record = {"layers": list(self._rows(old)), "notes": [], "digests": digests}
            seconds = time.monotonic() - start
            checkpoint.finish_block(new, hidden, record | {"seconds": seconds, "peak_bytes": peak_bytes()})
            self.progress.advance(new + 1)

    def _left(self, parameter: str, value: Tensor) -> Tensor:
        """What the result has of a parameter that is carried over."""
        return value

    def _rows(self, index: int) -> Iterable[dict[str, Any]]:
        """Rows of results.json for a block that is carried over."""
        return []

    def _write_outside(self, checkpoint: Checkpoint) -> None:
        """Shards of the tensors outside the blocks, one at a time."""
        for number, names in enumerate(self.outside, self.block_shards):
            checkpoint.write_shard(number, self._as_stored(names))

    def _as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the checkpoint: parameters in the recipe's dtype, others (old buffers) untouched."""
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

    def _write_expected(self, checkpoint: Checkpoint, records: list[dict[str, Any]]) -> None:
        """Logits that the reloaded model must reproduce, with its first `proof_blocks` blocks."""
        hidden = read_tensors(checkpoint.state / "proof.safetensors")["hidden"]
        at = positions(hidden.shape[1])
        logits = torch.cat([self.stream.logits(row[None])[:, at] for row in hidden])
        digests = {name: value for record in records for name, value in record["digests"].items()}
        adapter = {name: digest(matrix) for name, matrix in self.adapter.items()}
        tokens = self.data.tokens[: len(hidden)]
        names = {"blocks": self.architecture.blocks, "digests": digests, "adapter": adapter}
        write_expected(checkpoint.state / "expected", tokens, at, logits, names)

    def _write_small_files(self, checkpoint: Checkpoint, records: list[dict[str, Any]]) -> None:
        """Config, index, tokenizer and recipe."""
        import yaml

        folder = self.source.folder
        code = ("*.py",) if self.plan.recipe.trust_remote_code else ()
        for pattern in TOKENIZER_FILES + code:
            for path in sorted(folder.glob(pattern)) if folder else ():
                if path.is_file() and not path.name.endswith((".safetensors", ".gguf")):
                    shutil.copyfile(path, checkpoint.partial / path.name)
        config = self._config(records)
        if "per_layer_config" in config:
            shutil.copyfile(Path(__file__).with_name(CODE), checkpoint.partial / CODE)
        write_json(checkpoint.partial / "config.json", config)
        checkpoint.write_index()
        write_text(
            checkpoint.partial / "recipe.yaml", yaml.safe_dump(self.shared.origin.recipe.plain(), sort_keys=False)
        )

    def _config(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The model's config.json with its new dtype and, for packed formats, the quantization block."""
        config = self._dense_config(read_json(self.source.folder / "config.json") if self.source.folder else {})
        return config | self._quantization({row["name"] for record in records for row in record["layers"]})

    def _quantization(self, names: set[str]) -> dict[str, Any]:
        """What config.json says of the linears at these module paths of the checkpoint, which the format packs."""
        module = {found[0].removesuffix(".weight"): name.removesuffix(".weight") for name, found in self.stored.items()}
        kinds = {alias: self.plan.kind_of(name) for name in names for alias in {name, module[name]}}
        quantization = self.plan.format.config(kinds, ignored_linears(self.model, self.stored, names))
        return {"quantization_config": quantization} if quantization else {}

    def _dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config with the dtype of the result."""
        return {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": self.plan.recipe.dtype}

    def scores(self, folder: Path) -> dict[str, Any]:
        """The recipe's suite on the reloaded result and on the base model."""
        from llmcompress.evaluate import evaluate
        from llmcompress.suite import load_suite

        origin = self.shared.origin
        assert origin.recipe.evaluate is not None
        return evaluate(
            folder,
            load_suite(origin.recipe.evaluate.suite),
            base=origin.source.folder,
            base_fingerprint=origin.source.fingerprint,
            device=str(self.plan.device),
            trust_remote_code=origin.recipe.trust_remote_code,
            progress=staged(self.progress),
        )

    def text_scores(self, folder: Path) -> list[dict[str, Any]]:
        """Perplexity on the texts of the recipe's suite, of a stage that is not the last."""
        from llmcompress.evaluate import evaluate
        from llmcompress.suite import load_suite

        origin = self.shared.origin
        assert origin.recipe.evaluate is not None
        texts = load_suite(origin.recipe.evaluate.suite).model_copy(update={"divergence": None, "tasks": []})
        trust, progress = origin.recipe.trust_remote_code, staged(self.progress)
        found = evaluate(folder, texts, device=str(self.plan.device), trust_remote_code=trust, progress=progress)
        return [{"name": row["name"], "value": row["compressed"]["value"]} for row in found["perplexity"]]

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by their names in the model."""
        return tensors_by_parameter(self.model, self.source, self.stored, self.plan.dtype)(names)

    def _check_against_plan(self) -> None:
        """The plan saw names and shapes; the modules must agree, or something would be skipped."""
        kept = self.plan.kept
        planned = {linear.name: linear.shape for linear in self.plan.linears if linear.steps}
        found: dict[str, tuple[int, int]] = {}
        for index in range(self.architecture.count):
            for name, linear in self.architecture.at(index).linears.items():
                stored = self.stored[f"{self.architecture.block(index)}.{name}.weight"][0].removesuffix(".weight")
                found |= {} if stored in kept else {stored: (linear.out_features, linear.in_features)}
        transposed = any(x.transposed for layout in self.architecture.layouts for x in layout.linears.values())
        if planned != found or transposed != self.plan.transposed:
            odd = sorted(set(planned.items()) ^ set(found.items()))[:3]
            raise PlanError(
                f"{self.source.name}: the model's linears are not the matrices of its checkpoint (such as {odd}); "
                f"{type(self.model).__name__} is not supported"
            )
