"""llmcompress: make Hugging Face causal LMs smaller, and prove that the result loads in stock engines.

From the command line: `python -m llmcompress --help`. From Python, the same steps:

    from llmcompress.recipe import load_recipe
    from llmcompress.run import run

    results = run(load_recipe(Path("recipe.yaml")), Path("out"))

    model = llmcompress.load("out")  # of a folder in one of our own formats; others load with transformers alone

This file imports nothing until a name is used, so that `import llmcompress` costs nothing.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load`, from `llmcompress.runtime`, when it is first asked for."""
    if name != "load":
        raise AttributeError(f"module 'llmcompress' has no attribute {name!r}")
    import importlib

    return importlib.import_module("llmcompress.runtime").load
