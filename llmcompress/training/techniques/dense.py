"""Dense training: all weights learn, none goes. What every technique is compared with."""

from llmcompress.training.step import Learn


class Dense(Learn):
    """Options of `train: dense`."""
