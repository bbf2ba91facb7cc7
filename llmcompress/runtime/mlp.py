"""Gated MLPs, down(act(gate x) * up x), whose first two linears read x once: one call of `int4_gated_mlp`.

Candidates are modules with `gate_proj`, `up_proj`, `down_proj` and `act_fn`. What else their class may do is not read
but observed: the fused module must compute what the module before it did, on random tokens, or it is not taken.
"""

import functools
from collections.abc import Callable
from typing import Any

import llmcompress_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.runtime.linears import PackedLinear
from llmcompress.runtime.operators import INT4

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # as the operator names them
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
ROUNDINGS = 2  # relative RMS that the two ways may differ by, in units of the dtype's eps


kernels: Any = llmcompress_kernels  # which may be a version without the operator


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
        """x [..., hidden] -> [..., hidden]. What has been unpacked since is computed as in any other MLP."""
        gate, up = self.gate_proj, self.up_proj
        if fusable(gate, up) and gate.takes(x) and not (is_watched(gate) or is_watched(up)):
            weights = gate.packed(), up.packed()
            middle = kernels.int4_gated_mlp(x, *weights, self.activation, gate.bias, up.bias)
        else:
            middle = self.act_fn(gate(x)) * up(x)
        y: Tensor = self.down_proj(middle)
        return y

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"operator=int4_gated_mlp, activation={self.activation}"


def fuse_gated(model: nn.Module) -> list[str]:
    """Fuse every gated MLP that can be, in place; their names."""
    fused: list[str] = []
    tried: dict[tuple[Any, ...], bool] = {}  # one try for all MLPs of a kind
    for name in [name for name, module in model.named_modules() if is_gated(module)]:
        mlp: Any = model.get_submodule(name)
        activation = activation_of(mlp.act_fn)
        if activation is None:
            continue
        new = GatedMLP(mlp, activation)
        kind = (type(mlp), activation, mlp.gate_proj.shape)
        if kind not in tried:
            tried[kind] = agree(mlp, new)
        if tried[kind]:
            model.set_submodule(name, new)
            fused.append(name)
    return fused


def is_watched(linear: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what this linear gets or gives, such as activation thresholds."""
    return bool(linear._forward_pre_hooks or linear._forward_hooks)


def is_gated(module: nn.Module) -> bool:
    """Whether it has the parts, and its gate and up are int4 linears that one call can multiply."""
    if isinstance(module, GatedMLP) or not all(hasattr(module, name) for name in PARTS):
        return False
    return fusable(module.gate_proj, module.up_proj)


def fusable(gate: Any, up: Any) -> bool:
    """Two int4 linears of one shape and one kind of grid."""
    both = isinstance(gate, PackedLinear) and isinstance(up, PackedLinear)
    if not both or gate.operator is not INT4 or up.operator is not INT4:
        return False
    first, second = gate.packed(), up.packed()
    same_grid = first.scale.shape == second.scale.shape and (first.zero is None) == (second.zero is None)
    return gate.shape == up.shape and same_grid and first.scale.dtype == second.scale.dtype


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
