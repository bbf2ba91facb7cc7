"""Every method, by the name that recipes use. Adding a method is a file here and a line below."""

from llmcompress.methods.awq import AWQ
from llmcompress.methods.base import IntMethod, Method
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.hqq import HQQ
from llmcompress.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "hqq": HQQ,
}

__all__ = ["METHODS", "IntMethod", "Method"]
