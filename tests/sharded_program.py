"""What every process of a launch runs in tests/test_sharded_training.py and tests/test_deepspeed.py.

It is the loop on tiny models, or a whole run.

accelerate shards nothing on a CPU, though its own FSDP2 works there. `shard_on_cpu` says so to it after it was set up;
from there on all that is called is what a launch on GPUs calls. DeepSpeed works on a CPU as it is, but would first
compile an operator for sums in shared memory, which takes a minute; without it, sums are gloo's.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from tiny_runs import dying, proof_inside
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmcompress.checkpoint import write_tensors
from llmcompress.files import write_json
from llmcompress.recipe import parse_recipe
from llmcompress.training import Recover
from llmcompress.training.deepspeed import SWITCH
from llmcompress.training.loop import Task, train
from llmcompress.training.losses import cross_entropy
from llmcompress.training.processes import switched_on
from llmcompress.training_job import prepared

COMMON = {"loss": "cross_entropy", "steps": 4, "batch": 4, "learning_rate": 1e-3, "warmup": 1, "checkpoint_every": 2}
CASES: dict[str, dict[str, Any]] = {
    "tied": {"micro_batch": 2},
    "pruned": {"clip": 0.1, "weight_decay": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"parameters": "lora", "rank": 3},  # three rows do not part evenly
}


BFLOAT16 = "bfloat16"  # as a case
UNKNOWN = "unknown gradient"


class Killed(Exception):
    """Ends a training in the middle."""


def learn(case: str, state: Path, *, stop_at: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was seen, and all parameters of a tiny model after it; ends with `Killed` after step `stop_at`."""
    changes = {"precision": BFLOAT16} if case == BFLOAT16 else CASES.get(case, {})
    options = Recover.parse(COMMON | {"precision": "float32"} | changes, "steps[0]")
    model = tiny_model("llama", tie_word_embeddings=case == "tied")
    masks = {}
    if case == "pruned":
        matrices = [(name, p) for name, p in model.named_parameters() if "_proj" in name]
        masks = {name: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) > 0.5 for name, p in matrices}
        for name, p in matrices:
            p.data.mul_(masks[name])
    tokens = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(1))

    seen: dict[str, Any] = {"sharded": False, "windows": 0, "wrapped": ""}

    def loss(model: Any, rows: Tensor) -> Tensor:
        seen["sharded"] |= all(isinstance(p, DTensor) for p in model.parameters())
        seen["windows"] += len(rows)
        seen["wrapped"] = type(model).__name__
        found = cross_entropy(model(tokens[rows], use_cache=False).logits, tokens[rows])
        wrong = case == UNKNOWN and seen["windows"] > options.batch  # the slope of a root at zero is infinite
        return found + (0 * next(model.parameters()).sum()).abs().sqrt() if wrong else found

    def tell(done: int, shown: str) -> None:
        if done == stop_at:
            raise Killed

    student = prepared(model, options, keep=[])
    curve = train(student, options, Task(8, 16, loss, masks, cpu=True), state, tell)
    if first() and case == "lora":
        model = student.merge_and_unload()
    return seen | {"losses": curve.losses}, {name: p.detach() for name, p in model.named_parameters()}


def first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def learn_all(folder: Path, cases: list[str]) -> None:
    """Each case without and with an end in the middle, into FOLDER/<case>-whole and FOLDER/<case>-killed."""
    for case in cases:
        for way in ("whole", "killed"):
            state = folder / f"{case}-{way}"
            state.mkdir(parents=True, exist_ok=True)
            if way == "killed":
                with pytest.raises(Killed):
                    learn(case, state, stop_at=3)
            seen, parameters = learn(case, state)
            if first():
                write_tensors(state / "learned.safetensors", parameters)
                write_json(state / "seen.json", seen)


def first_fails(folder: Path) -> None:
    """The first process ends in the middle of a step, by an error that the others do not have."""
    from llmcompress.training.processes import leading, tasks, tell_others, training_together

    if first():
        with leading(cpu=True):
            tell_others({})
            with training_together():
                learn("tied", folder, stop_at=2)
    else:
        for _ in tasks(cpu=True):
            learn("tied", folder)


def whole_run(recipe_values: dict[str, Any], folder: Path, die: str | None) -> None:
    """A run as the command line does it, proved in this process; the first dies when it has made the file `die`."""
    from llmcompress.run import join, run

    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        if not first():
            join(parse_recipe(recipe_values))
            return
        if die:
            for function in ("rename", "replace"):
                patch.setattr(Path, function, dying(getattr(Path, function), "after", die))
        run(parse_recipe(recipe_values), folder)


def shard_on_cpu() -> None:
    """Let accelerate shard on a CPU if the launch asks for it."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def set_up(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = set_up


def compile_nothing() -> None:
    """Let DeepSpeed do without operators of its own."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))


if __name__ == "__main__":
    what, arguments = sys.argv[1], json.loads(sys.argv[2])
    if switched_on(SWITCH):
        compile_nothing()
    shard_on_cpu()
    if what == "learn":
        learn_all(Path(arguments["folder"]), arguments.get("cases", list(CASES)))
    elif what == "unknown":
        learn(UNKNOWN, Path(arguments["folder"]))
    elif what == "first_fails":
        first_fails(Path(arguments["folder"]))
    else:
        whole_run(arguments["recipe"], Path(arguments["folder"]), arguments["die"])
