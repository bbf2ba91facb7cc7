"""Every storage format, by the name that recipes use. Adding a format is a file here and a line below."""

from llmcompress.formats.base import Format
from llmcompress.formats.dense import Dense
from llmcompress.formats.pack_quantized import PackQuantized

FORMATS: dict[str, Format] = {
    "dense": Dense(),
    "pack-quantized": PackQuantized(),
}

__all__ = ["FORMATS", "Format"]
