"""Scripts and modules of `evals/`, which is no package: they import each other by name."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

EVALS = Path(__file__).parents[1] / "evals"


def evals_module(name: str) -> ModuleType:
    """One of them; its folder is on the path only while it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVALS))
        return importlib.import_module(name)
