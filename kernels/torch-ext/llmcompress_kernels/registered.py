"""An operator of torch's dispatcher: a kernel for GPUs, one for CPUs, and what tracing has to know.

    @operator("int4_linear")                   # on a GPU that has what it needs; its annotations are the schema
    def _int4_linear(x: Tensor, ...) -> Tensor: ...

    @_int4_linear.register_kernel("cpu")
    @_int4_linear.register_fake                # shape and dtype of the output

`torch.library.custom_op` gives the same, and wraps every call in Python once more, to find outputs that share memory
with inputs: 20 microseconds, where a small product on a CPU takes ten. A compiled model calls operators by this way
alone (direct.py), some hundred times per token.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .checks import check_gpu

Kernel = Callable[..., Tensor]
KEYS = {"cpu": "CPU", "cuda": "CUDA"}


class Operator:
    """A registered operator; calling it lets the dispatcher choose the kernel. It has no gradient, and says so."""

    def __init__(self, name: str, on_gpu: Kernel) -> None:
        self.name = add_op_namespace_prefix(name)
        schema = torch.library.infer_schema(on_gpu, mutates_args=())
        tags = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
        torch.library.define(self.name, schema, tags=tags)
        torch.library.impl(self.name, "CUDA", where_it_runs(name, on_gpu))
        torch.library.register_autograd(self.name, self.no_gradient)
        namespace, _, name = self.name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), name).default

    def __call__(self, *arguments: Any) -> Tensor:
        """By the kernel for the device of the tensors."""
        found: Tensor = self.overload(*arguments)
        return found

    def register_kernel(self, device: str) -> Callable[[Kernel], Kernel]:
        """The kernel for another device type."""

        def register(kernel: Kernel) -> Kernel:
            torch.library.impl(self.name, KEYS[device], kernel)
            return kernel

        return register

    def register_fake(self, fake: Kernel) -> Kernel:
        """What tracing calls in place of a kernel: an output without content."""
        torch.library.register_fake(self.name, fake)
        return fake

    def no_gradient(self, context: Any, gradient: Tensor) -> None:
        """Raises RuntimeError at a backward pass: none would be taken for a gradient of zero."""
        raise RuntimeError(f"{self.name}: a backward pass came to it, and it has no gradient; load the model unpacked")


def where_it_runs(name: str, on_gpu: Kernel) -> Kernel:
    """A kernel for GPUs that refuses, before anything of triton is imported, those on which it does not run."""

    @functools.wraps(on_gpu)
    def checked(x: Tensor, *others: Any) -> Tensor:
        check_gpu(name, x)
        return on_gpu(x, *others)

    return checked


def operator(name: str) -> Callable[[Kernel], Operator]:
    """Register a function as the operator `name` of this package's namespace, for GPUs."""
    return lambda on_gpu: Operator(name, on_gpu)
