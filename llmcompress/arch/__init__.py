"""What a decoder block is made of: its linears, which of them share an input, and the links between modules.

A *link* joins a producer (a norm, or rows of a linear) to the consumers of its output: dividing the producer's row i
by s_i and multiplying the consumers' columns that come from it by s_i leaves the model as it is. Methods that move
scale between modules (AWQ) and methods that remove channels need these.

Nothing here is a table of architectures. A tiny model of the same class and configuration is built with random
weights in float64, run, and observed: which linears were called with the same tensor, which of those tensors a norm
returned. Candidate links are then *tested*: the tiny block is rescaled, and the link is accepted if its output stays
the same to 1e-5. Candidates differ only in which rows of the producer make which columns of the consumer; that map is
a function of the head layout, so what is found on the tiny model holds for the full one.
"""

from llmcompress.arch.couplings import Channels, HeadRows, couplings_of, find_couplings
from llmcompress.arch.discovery import (
    Architecture,
    Layout,
    discover,
    ignored_linears,
    layer_config,
    match_names,
    per_layer_class,
    random_model,
    skeleton,
)
from llmcompress.arch.links import Heads, Link, row_factors, scale_consumers, scale_producer
from llmcompress.arch.modules import (
    Linear,
    Module,
    block_linears,
    find_blocks,
    first,
    is_transposed,
    quiet_transformers,
    rows_of,
)

__all__ = [
    "Architecture",
    "Channels",
    "HeadRows",
    "Heads",
    "Layout",
    "Linear",
    "Link",
    "Module",
    "block_linears",
    "couplings_of",
    "discover",
    "find_blocks",
    "find_couplings",
    "first",
    "ignored_linears",
    "is_transposed",
    "layer_config",
    "match_names",
    "per_layer_class",
    "quiet_transformers",
    "random_model",
    "row_factors",
    "rows_of",
    "scale_consumers",
    "scale_producer",
    "skeleton",
]
