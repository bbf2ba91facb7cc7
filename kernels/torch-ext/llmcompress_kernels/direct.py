"""When an operator's CPU code may be called without torch's dispatcher, which takes longer than a small product."""

import torch
from torch import Tensor


def may_call_directly(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing between a call and its kernel has work to do: tracing, modes, transforms, gradients.

    x: the activations, on whose device and type the dispatcher would decide. others: what else might want a gradient.
    """
    return (
        x.is_cpu
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )
