"""Every storage format, by the name that recipes use. Adding a format is a file here and a line below."""

from llmcompress.formats.base import Format, OwnFormat
from llmcompress.formats.bitmask import Bitmask
from llmcompress.formats.dense import Dense
from llmcompress.formats.pack_quantized import PackQuantized
from llmcompress.formats.sparse24 import METHOD, VERSION, Sparse24, Sparse24Int4

OWN: dict[str, OwnFormat] = {
    "sparse24": Sparse24(),
    "sparse24-int4": Sparse24Int4(),
    "bitmask": Bitmask(),
}
FORMATS: dict[str, Format] = {
    "dense": Dense(),
    "pack-quantized": PackQuantized(),
    **OWN,
}

__all__ = ["FORMATS", "METHOD", "OWN", "VERSION", "Format", "OwnFormat"]
