"""Dense training: all weights learn, none goes. What every technique is compared with."""

from typing import ClassVar

from llmcompress.shelf import Shelf
from llmcompress.training.step import Learn


class Dense(Learn):
    """Options of `train: dense`."""

    shelf: ClassVar[Shelf] = Shelf(
        "during training", "nothing", "nothing: what the others are compared with", "it is plain training"
    )
