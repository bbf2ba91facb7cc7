"""Structure: parts of a model that go as a whole, so that what is left is a smaller model of the same kind.

STRUCTURES are the kinds of parts, by the name that recipes use; their scores are in `scores/`.
"""

from llmcompress.structure.step import Depth, Hidden, Structure, Sublayer, Width

STRUCTURES: dict[str, type[Structure]] = {
    "mlp_channel": Width,
    "kv_group": Width,
    "query_head": Width,
    "attention": Sublayer,
    "mlp": Sublayer,
    "block": Depth,
    "hidden": Hidden,
}

STRUCTURE_WORDS = {
    "mlp_channel": "One inner feature of an MLP: its rows of gate and up, its column of down",
    "kv_group": "A key-value head with its query heads",
    "query_head": "The query head at the same place of every key-value group",
    "attention": "The attention of a block",
    "mlp": "The MLP of a block",
    "block": "A whole decoder block",
    "hidden": "A channel of the residual stream: its entry in the embedding, in norms, linears and head of all blocks",
}

__all__ = ["STRUCTURES", "STRUCTURE_WORDS", "Depth", "Hidden", "Structure", "Sublayer", "Width"]
