"""Every method, by the name that recipes use. Adding a method is a file here and a line below."""

from llmcompress.methods.awq import AWQ
from llmcompress.methods.base import Budgeted, IntMethod, Method, Pruner
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.hqq import HQQ
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.random import Random
from llmcompress.methods.ria import RIA
from llmcompress.methods.rtn import RTN
from llmcompress.methods.snip import SNIP
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.methods.taylor import Taylor
from llmcompress.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "hqq": HQQ,
    "magnitude": Magnitude,
    "random": Random,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
    "snip": SNIP,
    "taylor": Taylor,
}

__all__ = ["METHODS", "Budgeted", "IntMethod", "Method", "Pruner"]
