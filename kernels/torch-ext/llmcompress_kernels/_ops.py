"""The namespace of the operators: `torch.ops.llmcompress`.

A build for the Hugging Face Hub has another file here, which its builder writes: with a namespace that no other build
has, so that several of them, and this package beside them, can be loaded in one process.
"""

NAMESPACE = "llmcompress"


def add_op_namespace_prefix(name: str) -> str:
    """`int4_linear` -> `llmcompress::int4_linear`. The function's name is the one that the Hub's builder gives it."""
    return f"{NAMESPACE}::{name}"
