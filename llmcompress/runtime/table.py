"""Which operator multiplies with which stored form. A new operator is a row here."""

from llmcompress.runtime.operators import INT4, Operator
from llmcompress.runtime.sparse import sparse_operators

OPERATORS: dict[str, Operator] = {  # by the form that files have
    "pack-quantized": INT4,
    **sparse_operators(),
}
