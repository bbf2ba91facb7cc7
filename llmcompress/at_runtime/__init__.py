"""At run time: what a model leaves out while it computes. RUNTIMES are the kinds of it, by the name that recipes use.

Such a step changes no weight. It writes a file beside them, which `llmcompress.load` reads, and stock engines do not.
"""

from llmcompress.at_runtime.step import Runtime, Teal

RUNTIMES: dict[str, type[Runtime]] = {"teal": Teal}

__all__ = ["RUNTIMES", "Runtime", "Teal"]
