"""When a technique works, from a step on until another, after which what is left learns on; and how fast it goes."""

from typing import Self

from pydantic import Field, model_validator

from llmcompress.training.step import Learn


class Scheduled(Learn):
    """What techniques have that begin and end within a training."""

    begin: float = Field(0.1, ge=0, lt=1, description="share of the steps after which it begins")
    until: float = Field(0.75, gt=0, le=1, description="share of the steps after which what has gone stays gone")

    @property
    def first(self) -> int:
        """The step after which it begins."""
        return int(self.begin * self.steps)

    @property
    def end(self) -> int:
        """The step after which nothing goes any more."""
        return min(int(self.until * self.steps), self.steps - 1)

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.end <= self.first:
            raise ValueError(
                f"it would end before it starts: from step {self.first} to step {self.end} of {self.steps}; use other "
                "shares `begin` and `until`, or more steps"
            )
        return self

    def active(self, step: int) -> bool:
        """Whether it works after this step."""
        return self.first <= step <= self.end

    def done(self, step: int) -> float:
        """How much of its time has passed, from 0 to 1."""
        return ramp((step - self.first) / (self.end - self.first))

    def turn(self, step: int, every: int) -> bool:
        """Whether it is active after this step and not only waits for the next of its turns; the last is at `end`."""
        return self.active(step) and ((step - self.first) % every == 0 or step == self.end)


def ramp(passed: float, power: int = 1) -> float:
    """How far something has come when a share `passed` of its time is over: 1 - (1 - passed)^power, from 0 to 1.

    power: 1 for a straight line; 3 for the cubic of gradual pruning, fast at first.
    """
    return 1 - (1 - min(1.0, max(0.0, passed))) ** power
