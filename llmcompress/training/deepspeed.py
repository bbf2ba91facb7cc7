"""DeepSpeed's ZeRO, stages 1 and 2: every process holds the weights, and a share of the optimizer's state.

    accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2 -m llmcompress run RECIPE

In stage 2 gradients are shared out too, as soon as they are there. Its engine lays all parameters of a group end to
end, cuts that into one slice for each process, and keeps of its own slice a second copy of the weights, from which the
optimizer learns, and both moments. accelerate's wrapper takes the optimizer's step inside the last backward pass; the
loop needs both apart, so `Zero` calls the engine itself and has the loop see what it always sees: whole parameters and
moments by name. They are put together and cut by DeepSpeed's own functions, so the state on disk is safetensors, as
everywhere.

- Gradients are gone from the parameters when the backward pass ends, so masks are hooks that clear them before that. A
  weight of zero without gradients has moments of zero: AdamW leaves it where it is, in both copies.
- The engine clips, and takes no step if the norm is no number.
- The recipe alone says batch, passes, clipping, optimizer, schedule and precision; a configuration that says one of
  these, too, is refused. Products in bfloat16 are torch's autocast, with weights and sums of gradients in float32.

It also works on a CPU, over gloo, where the library first compiles an operator for sums in shared memory: that takes a
minute and a C++ compiler, and waits for ever behind a `lock` file in torch's folder of extensions if an earlier one was
killed.

Given up: stage 3, where parameters have neither data nor shape between the passes, for which FSDP2 does the same; state
on the CPU or a disk, since another AdamW would compute it. A parameter that a step does not reach (an expert that no
token asks for) has a gradient of zero here and none elsewhere, so its weight decays and its moments fade.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import CalibrationError
from llmcompress.training.processes import refusal
from llmcompress.training.technique import MOMENTS

if TYPE_CHECKING:
    from datetime import timedelta

    from accelerate import Accelerator

    from llmcompress.training.step import Train

SWITCH = "ACCELERATE_USE_DEEPSPEED"
OLDEST = "0.19.8"  # which takes no step with a gradient that is no number; what older ones do was not tried
STAGES = (1, 2)
OF_RECIPE = {  # key of a DeepSpeed configuration -> the option that says it instead
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_clipping": "clip",
    "optimizer": "learning_rate",
    "scheduler": "warmup",
    "torch_autocast": "precision",
}


def connect(*, cpu: bool, timeout: "timedelta | None") -> "Accelerator":
    """accelerate, in a process that was launched for DeepSpeed; arguments as those of `sharding.start`.

    Raises PlanError without the library, or for a configuration that training does not work with.
    """
    remedy = f"run `pip install --no-build-isolation 'deepspeed>={OLDEST}'`"
    if find_spec("deepspeed") is None:
        raise refusal("was set up for DeepSpeed, which is not installed", remedy)
    if "LOCAL_RANK" not in os.environ:
        raise refusal("was set up for DeepSpeed, and launched nothing", "launch with `accelerate launch`")
    if cpu and torch.cuda.is_available():  # DeepSpeed cannot be told to leave it alone
        raise refusal("was set up for DeepSpeed, which would take the GPU", "launch plain processes for the CPU")
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, compare_versions

    if compare_versions("deepspeed", "<", OLDEST):
        raise refusal(f"was set up for DeepSpeed before version {OLDEST}", remedy)
    options: dict[str, Any] = {"timeout": timeout} if timeout else {}
    if not torch.cuda.is_available():
        options["backend"] = "gloo"  # unless it is named, accelerate counts one process on a CPU
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(**options)])
    check_configuration(accelerator.state.deepspeed_plugin.deepspeed_config)
    return accelerator


def check_configuration(found: Mapping[str, Any]) -> None:
    """Raises PlanError for what a DeepSpeed configuration says and training does not work with."""
    zero = found.get("zero_optimization", {})
    if (stage := zero.get("stage", 0)) not in STAGES:
        raise refusal(f"was set up for ZeRO stage {stage}", "use `--zero_stage 2`, or FSDP with `--fsdp_version 2`")
    for part in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(part) or {}).get("device") or "none") != "none":
            raise refusal(f"was told {part}: {device}", "leave that out, or launch more processes")
    for dtype in ("fp16", "bf16"):
        if found.get(dtype, {}).get("enabled") is True:
            raise refusal(f"was told {dtype}", "set `precision` in the recipe instead")
    for key, option in OF_RECIPE.items():
        if found.get(key, "auto") != "auto":
            raise refusal(f"was told {key}", f"leave that out, or set it to auto: `{option}` in the recipe says it")
    if (passes := found.get("gradient_accumulation_steps", "auto")) not in ("auto", 1):  # the launcher says 1 by itself
        raise refusal(
            f"was told gradient_accumulation_steps: {passes}", "leave that out: `micro_batch` in the recipe says it"
        )


def settings(options: "Train", processes: int) -> dict[str, Any]:
    """What a recipe's step is in a DeepSpeed configuration."""
    return {
        "train_batch_size": options.batch,
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": passes_of(options, processes),
        "gradient_clipping": options.clip,
        # An empty list of modules: else gradients of linears would be summed in bfloat16.
        "torch_autocast": {
            "enabled": options.precision == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


def passes_of(options: "Train", processes: int) -> int:
    """Backward passes of each process in a step."""
    return options.batch // (processes * options.micro_batch)


class Zero:
    """accelerate for the loop where DeepSpeed trains; what is not here is accelerate's own."""

    def __init__(self, accelerator: "Accelerator", options: "Train") -> None:
        self.accelerator, self.options = accelerator, options
        self.passes, self.passed = passes_of(options, accelerator.num_processes), 0
        self.engine: Any = None
        self.hooks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The model in its engine, and its optimizer by whole parameters."""
        self.accelerator.gradient_accumulation_steps = self.passes
        with told(self.accelerator.state.deepspeed_plugin, settings(self.options, self.accelerator.num_processes)):
            self.engine, _ = self.accelerator.prepare(model, optimizer)
        return self.engine, ZeroOptimizer(self.engine)

    def hold(self, trained: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Clear gradients of masked weights before they are shared out."""
        self.hooks += [trained[name].register_hook(mask.mul) for name, mask in masks.items()]

    def backward(self, loss: Tensor) -> None:
        """One pass; the last one of a step completes its gradient. The loss is weighted by its share already."""
        self.passed += 1
        self.engine.set_gradient_accumulation_boundary(self.passed % self.passes == 0)
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip_grad_norm_(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Norm of the whole gradient, which the engine clips as it takes the step; infinite if it is no number."""
        return torch.as_tensor(self.engine.optimizer.scaled_global_norm())

    def free_memory(self) -> None:
        """Leave nothing of the engine on the parameters."""
        for hook in self.hooks:
            hook.remove()
        self.accelerator.free_memory()


@contextmanager
def told(plugin: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Add to the configuration of a launch while an engine is made; a later step says other values."""
    configuration = plugin.deepspeed_config
    own = deepcopy(configuration)
    configuration.update(values)
    try:
        yield
    finally:
        plugin.deepspeed_config = plugin.hf_ds_config.config = own  # the engine keeps the other


class ZeroOptimizer:
    """The optimizer of an engine, as the loop knows one."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.state = WholeState(engine.optimizer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With the learning rates."""
        return self.engine.optimizer.param_groups

    def step(self) -> None:
        """In all processes; raises CalibrationError in each of them if the gradient is no number."""
        self.engine.step()
        if not self.engine.was_step_applied():
            raise CalibrationError("the gradient is NaN or infinite; lower `learning_rate`, or look at the data")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine has done it."""


class WholeState:
    """Adam's state by parameter, put together and cut; every process has to ask."""

    def __init__(self, optimizer: Any) -> None:
        """optimizer: DeepSpeed's, whose own one learns slices.

        Moments are made here, as the first step would make them: DeepSpeed links them to parameters after the first
        group of its first step, when those of other groups are not there yet.
        """
        self.slices: dict[Tensor, dict[str, Tensor]] = optimizer.optimizer.state
        for group in optimizer.param_groups:
            for slice_ in group["params"]:
                moments = {key: torch.zeros_like(slice_) for key in MOMENTS}
                self.slices[slice_] = {"step": torch.tensor(0.0), **moments}
        optimizer._lazy_init_hp_params_optimizer_state()

    def __contains__(self, parameter: Tensor) -> bool:
        return True

    def __getitem__(self, parameter: Tensor) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(self.slices.values()))["step"].clone()  # safetensors writes no tensor under two names
        return {"step": step} | {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}

    def __setitem__(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        """Cut what was saved, and the weight itself, which is there already."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for state in self.slices.values():  # all parameters are in every step
            state["step"].copy_(values["step"])
        safe_set_full_fp32_param(parameter, parameter.detach())
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[key], key)
