"""Training: recovery, and techniques that become sparse while they learn.

TRAININGS are their options, by the name that recipes use.
"""

from llmcompress.training.step import Learn, Recover, Train
from llmcompress.training.techniques.dense import Dense
from llmcompress.training.techniques.dsa import DSA
from llmcompress.training.techniques.early_bird import EarlyBird
from llmcompress.training.techniques.geometric_median import SoftGeometricMedian
from llmcompress.training.techniques.gradual import Gradual
from llmcompress.training.techniques.grasp import Grasp
from llmcompress.training.techniques.group_lasso import GroupLasso
from llmcompress.training.techniques.growing_l2 import GrowingL2
from llmcompress.training.techniques.l0 import L0
from llmcompress.training.techniques.lottery_ticket import LotteryTicket
from llmcompress.training.techniques.masked import Masked
from llmcompress.training.techniques.proximal_24 import Proximal24
from llmcompress.training.techniques.random import Random
from llmcompress.training.techniques.rigl import RigL
from llmcompress.training.techniques.set import SET
from llmcompress.training.techniques.skeleton import Skeleton
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
    "group_lasso": GroupLasso,
    "proximal_24": Proximal24,
    "geometric_median": SoftGeometricMedian,
    "skeleton": Skeleton,
    "dsa": DSA,
    "growing_l2": GrowingL2,
    "l0": L0,
    "lottery_ticket": LotteryTicket,
    "early_bird": EarlyBird,
}

__all__ = ["TRAININGS", "Learn", "Recover", "Train"]
