"""Training: techniques that learn. TRAININGS are their options, by the name that recipes use."""

from llmcompress.training.step import Recover, Train

TRAININGS: dict[str, type[Train]] = {"recover": Recover}

__all__ = ["TRAININGS", "Recover", "Train"]
