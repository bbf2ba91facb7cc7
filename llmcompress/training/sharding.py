"""Weights that are shared out: FSDP2, where each process holds a slice of every parameter.

    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
        --num_processes 2 -m llmcompress run RECIPE

accelerate makes the parameters DTensors: a parameter keeps its name and its shape, a process holds some of its rows.
Products with a mask, AdamW and the norm of the gradient work on slices as they do on whole tensors, so the loop need
not know; only what enters (masks, the state of an earlier run) is cut, and what leaves (state, result) is put together.
Every process cuts from its own copy of the whole; putting together takes all of them, one parameter at a time, so
that no device has to hold the model. The state on disk is that of a plain run.

DeepSpeed, which shares out the optimizer's state and gradients, has a file of its own, `deepspeed.py`.

Given up: FSDP1, whose flat parameters know neither names nor shapes.
"""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import PlanError
from llmcompress.training.deepspeed import SWITCH, Zero, connect
from llmcompress.training.processes import refusal, switched_on

if TYPE_CHECKING:
    from datetime import timedelta

    from accelerate import Accelerator

    from llmcompress.training.step import Train

PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")  # accelerate's kinds of launches in which every process holds the model
OTHERS = {  # what `accelerate launch` sets for launches that training does not work with
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism of its own",
}
INSTEAD = "launch plain processes, or FSDP with `--use_fsdp --fsdp_version 2`"


def start(*, cpu: bool, timeout: "timedelta | None" = None, options: "Train | None" = None) -> "Accelerator | Zero":
    """accelerate as this process was launched.

    cpu: stay there, whatever the machine has.  timeout: how long processes wait for each other; None: as torch does.
    options: of the step that will be trained; None: only join the group.
    Raises PlanError for a launch that training does not work with.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    for variable, name in OTHERS.items():
        if switched_on(variable):
            raise refusal(f"was set up for {name}", INSTEAD)
    if switched_on(SWITCH):
        found = connect(cpu=cpu, timeout=timeout)
        return found if options is None else Zero(found, options)
    sharded = switched_on("ACCELERATE_USE_FSDP")
    version = os.environ.get("FSDP_VERSION", "1")  # 1 is accelerate's default
    if sharded and version != "2":
        raise refusal(f"was set up for FSDP{version}", "launch with `--fsdp_version 2`")
    handlers: list[Any] = [InitProcessGroupKwargs(timeout=timeout)] if timeout else []
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)  # steps may differ in precision
    kind = accelerator.distributed_type.value
    if sharded and kind != "FSDP":
        raise refusal(f"was set up for FSDP, and shards nothing on {accelerator.device.type}", "launch plain processes")
    if not sharded and kind not in PLAIN:
        raise refusal(f"was set up for {kind}", INSTEAD)
    if sharded:
        check_plugin(accelerator.state.fsdp_plugin)
    return accelerator


def refuse_sharing(technique: str) -> None:
    """Raise PlanError if this launch shares out the weights, of which a technique has to see the whole."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), (SWITCH, "DeepSpeed")):
        if switched_on(variable):
            raise PlanError(
                f"accelerate launch: was set up for {name}, and {technique} ranks all weights of a matrix; launch "
                "plain processes"
            )


def check_plugin(plugin: Any) -> None:
    """Raises PlanError for options of FSDP that training does not work with."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    if plugin.activation_checkpointing:
        raise refusal("was told to checkpoint activations", "set `gradient_checkpointing: true` in the recipe instead")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise refusal("was told to keep the weights on the CPU", "launch without `--fsdp_offload_params`")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a slice; every process has to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, in the shape of `parameter`, cut and placed as that is; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def put_together(model: nn.Module, *, keep: bool) -> None:
    """Give `model` whole parameters again, on the CPU, if this process is to keep them; every process has to call."""
    from torch.distributed.tensor import DTensor

    found: dict[int, nn.Parameter | None] = {}  # by identity: a tied one is put together once, and stays tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in found:
                value = parameter.full_tensor()
                found[id(parameter)] = nn.Parameter(value.cpu(), parameter.requires_grad) if keep else None
            if keep:
                setattr(module, name, found[id(parameter)])
