"""SET: as RigL, but new weights come at random places. Mocanu et al. 2018, arXiv:1707.04780.

    n = f(t) nnz of a matrix go, those with the smallest |W_ij|; n others come, each place without a weight as likely

f is that of RigL, nnz counts the weights that a matrix has; places whose weight has just gone may be drawn, too. The
paper trades a constant share after each epoch; here it is RigL's schedule, so that the two differ in nothing but
where weights come, which is how Evci et al. 2020 compare them.
"""

from typing import ClassVar

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import WEIGHTS, Shelf
from llmcompress.training.technique import Technique
from llmcompress.training.techniques.rigl import Moving, Trade


class SET(Moving):
    """Options of `train: set`."""

    shelf: ClassVar[Shelf] = Shelf("during training", "single weights", WEIGHTS, "as RigL")

    def technique(self) -> Technique:
        """Weights come at random places."""
        return RandomGrowth(self)


class RandomGrowth(Trade):
    """Weights come at random places."""

    def wish(self, weight: Tensor, generator: "torch.Generator") -> Tensor:
        """Uniform numbers, the same ones on any device."""
        return torch.rand(weight.shape, generator=generator).to(weight.device)
