"""torch, loaded when something of it is first used.

A plan needs the records of methods and formats and none of their arithmetic, and `import torch` alone takes several
times as long as making the plan. So the modules that a plan reaches take torch from here. Annotations there name
`Tensor`, which stands for anything until a type checker looks, and write other torch types in quotes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _Later:
        """A module that is imported when it is first asked for something."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    torch = _Later("torch")
    Tensor = Any

__all__ = ["Tensor", "torch"]
