"""Which operator multiplies with which stored form. A new operator is a row here."""

from llmcompress.runtime.operators import INT4, Operator
from llmcompress.runtime.sparse import SPARSE24, SPARSE24_INT4

OPERATORS: dict[str, Operator] = {  # by the form that files have
    "pack-quantized": INT4,
    "sparse24": SPARSE24,
    "sparse24-int4": SPARSE24_INT4,
}
