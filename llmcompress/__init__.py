"""llmcompress: make Hugging Face causal LMs smaller, and prove that the result loads in stock engines.

From the command line: `python -m llmcompress --help`. From Python, the same steps:

    from llmcompress.recipe import load_recipe
    from llmcompress.run import run

    results = run(load_recipe(Path("recipe.yaml")), Path("out"))

    model = llmcompress.load("out")      # computes with packed weights; stock transformers would unpack them
    llmcompress.accelerate(model)        # or in a model that stock transformers has loaded

This file imports nothing until a name is used, so that `import llmcompress` costs nothing.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load` and `accelerate`, from `llmcompress.runtime`, when they are first asked for."""
    if name not in ("load", "accelerate"):
        raise AttributeError(f"module 'llmcompress' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("llmcompress.runtime"), name)
