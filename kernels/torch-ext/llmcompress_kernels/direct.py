"""When an operator's CPU code may be called without torch's dispatcher, which takes longer than a small product.

The dispatcher is what lets modes (fake tensors, counters of operations) and transforms (vmap, grad) see an operator, so
it may be left out only while there are none. Torch has no public way to ask that: `torch.compiler` knows of its own
tracing alone. So two private functions are asked, which its own Python code relies on; in a torch without them every
call takes the dispatcher's way, which is right and some microseconds slower.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def watchers() -> tuple[Callable[[], int], Callable[[], object | None]] | None:
    """What counts dispatch modes, and what gives the innermost transform; None in a torch without them."""
    try:
        return torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
    except AttributeError:
        return None


def is_watched() -> bool:
    """Whether a mode or a transform may want to see operators; True where that cannot be known."""
    found = watchers()
    return found is None or found[0]() > 0 or found[1]() is not None


def may_call_directly(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing between a call and its kernel has work to do: tracing, modes, transforms, gradients.

    x: the activations, on whose device and type the dispatcher would decide. others: what else might want a gradient.
    """
    return (
        x.is_cpu
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))
        and not is_watched()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )
