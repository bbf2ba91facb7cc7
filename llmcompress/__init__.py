"""llmcompress: make Hugging Face causal LMs smaller, and prove that the result loads in stock engines.

From the command line: `python -m llmcompress --help`. From Python, the same steps:

    from llmcompress.recipe import load_recipe
    from llmcompress.run import run

    results = run(load_recipe(Path("recipe.yaml")), Path("out"))

This file imports nothing, so that `import llmcompress` costs nothing.
"""

__version__ = "0.1.0"
