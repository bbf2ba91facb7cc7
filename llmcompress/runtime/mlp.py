"""Gated MLPs, down(act(gate x) * up x), whose first two linears read x once: one call of `int4_gated_mlp`.

Candidates are modules with `gate_proj`, `up_proj`, `down_proj` and `act_fn`, of which one of the first two is packed.
What else their class may do is not read but observed: the fused module must compute what the module before it did, on
random tokens, or it is not taken. Each candidate that is not has a reason.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from llmcompress_kernels import int4_gated_mlp
from torch import Tensor, nn

from llmcompress.runtime.linears import PackedLinear
from llmcompress.runtime.operators import INT4

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # as the operator names them
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
JOINED = ".gate_up_proj"
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
ROUNDINGS = 2  # relative RMS that the two ways may differ by, in units of the dtype's eps


class GatedMLP(nn.Module):
    """The MLP of a block, with the submodules of the module that it takes the place of."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def __init__(self, mlp: nn.Module, activation: str) -> None:
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(mlp, name))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]. What is no longer packed, or has an adapter, is computed one by one."""
        gate, up = self.gate_proj, self.up_proj
        plain = type(gate) is PackedLinear and type(up) is PackedLinear  # then they are those that were fused
        if plain and gate.takes(x) and not (is_watched(gate) or is_watched(up)):
            middle = int4_gated_mlp(x, gate.packed(), up.packed(), self.activation, gate.bias, up.bias)
        else:
            middle = self.act_fn(gate(x)) * up(x)
        y: Tensor = self.down_proj(middle)
        return y

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"operator=int4_gated_mlp, activation={self.activation}"


def fuse_gated(model: nn.Module) -> dict[str, str | None]:
    """Fuse every gated MLP that can be, in place; by name None for those, or why it is two calls as before."""
    done: dict[str, str | None] = {}
    tried: dict[tuple[Any, ...], bool] = {}  # one try for all MLPs of a kind
    for name in [name for name, module in model.named_modules() if is_gated(module)]:
        mlp: Any = model.get_submodule(name)
        fused = fused_or_why_not(mlp, tried)
        if isinstance(fused, GatedMLP):
            model.set_submodule(name, fused)
        done[name] = None if isinstance(fused, GatedMLP) else fused
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    joined = [name for name in packed if name.endswith(JOINED)]
    return done | {name.removesuffix(JOINED): "gate and up are one linear already" for name in joined}


def fused_or_why_not(mlp: Any, tried: dict[tuple[Any, ...], bool]) -> GatedMLP | str:
    """The fused form of an MLP, or why it has none. tried: what has come out for MLPs of a kind, added to."""
    why = "it has hooks, which would be lost" if is_watched(mlp) else unlike(mlp.gate_proj, mlp.up_proj)
    if why is not None:
        return why
    activation = activation_of(mlp.act_fn)
    if activation is None:
        return f"its activation is none of {', '.join(ACTIVATIONS)}"
    new = GatedMLP(mlp, activation)
    kind = (type(mlp), activation, mlp.gate_proj.shape)
    if kind not in tried:
        tried[kind] = agree(mlp, new)
    return new if tried[kind] else f"{type(mlp).__name__} computes something else than a gated MLP"


def is_watched(linear: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what this linear gets or gives, such as activation thresholds."""
    return bool(linear._forward_pre_hooks or linear._forward_hooks)


def is_gated(module: nn.Module) -> bool:
    """Whether it has the parts, and a packed linear among the first two."""
    if isinstance(module, GatedMLP) or not all(hasattr(module, name) for name in PARTS):
        return False
    return isinstance(module.gate_proj, PackedLinear) or isinstance(module.up_proj, PackedLinear)


def unlike(gate: Any, up: Any) -> str | None:
    """Why one call cannot multiply with both; None if it can."""
    if not (isinstance(gate, PackedLinear) and isinstance(up, PackedLinear)):
        return "one of gate_proj and up_proj is not packed"
    if gate.operator is not INT4 or up.operator is not INT4:
        return f"no operator takes two weights of {(gate if gate.operator is not INT4 else up).operator.name}"
    if gate.shape != up.shape:
        return f"gate_proj is {list(gate.shape)} and up_proj {list(up.shape)}"
    first, second = gate.packed(), up.packed()
    if first.scale.shape != second.scale.shape or first.scale.dtype != second.scale.dtype:
        return "gate_proj and up_proj differ in their groups or in the dtype of their scales"
    return None if (first.zero is None) == (second.zero is None) else "one of gate_proj and up_proj has zero points"


def activation_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name of an activation, by its values."""
    x = torch.linspace(-8, 8, 257)
    try:
        y = function(x)
    except (RuntimeError, TypeError, ValueError):
        return None  # it wants something else than one tensor
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(known(x), y, 1e-5, 1e-6)), None)


@torch.no_grad()
def agree(before: Any, after: GatedMLP) -> bool:
    """Whether both compute the same on random tokens, up to roundings; not if the MLP wants more than tokens."""
    floats: Tensor = before.gate_proj.packed().scale
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, before.gate_proj.in_features, generator=generator).to(floats)
    try:
        wanted = before(x).float()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    error = (after(x).float() - wanted).norm() / wanted.norm()
    return bool(error <= ROUNDINGS * torch.finfo(floats.dtype).eps)
