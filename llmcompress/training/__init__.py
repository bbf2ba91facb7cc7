"""Training: recovery, and techniques that become sparse while they learn.

TRAININGS are their options, by the name that recipes use.
"""

from llmcompress.training.step import Learn, Recover, Train
from llmcompress.training.techniques.dense import Dense
from llmcompress.training.techniques.gradual import Gradual
from llmcompress.training.techniques.grasp import Grasp
from llmcompress.training.techniques.masked import Masked
from llmcompress.training.techniques.random import Random
from llmcompress.training.techniques.rigl import RigL
from llmcompress.training.techniques.set import SET
from llmcompress.training.techniques.snip import Snip

TRAININGS: dict[str, type[Train]] = {
    "recover": Recover,
    "dense": Dense,
    "masked": Masked,
    "random": Random,
    "snip": Snip,
    "grasp": Grasp,
    "rigl": RigL,
    "set": SET,
    "gradual": Gradual,
}

__all__ = ["TRAININGS", "Learn", "Recover", "Train"]
