"""2:4 by regularization: of every four neighbouring weights two shrink to zero while the model learns. ProxSparse, Liu
et al. 2025, arXiv:2502.00258.

    R(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|        0 if and only if two of the four are zero

Every `every` steps the proximal step of λ R is taken. With u = |w| / r, r the root mean square of the matrix, so that λ
means the same for every one, and η the learning rate of the step, it is

    min over v >= 0 of  1/2 ||v - u||² + κ (v1 v2 v3 + v2 v3 v4 + v3 v4 v1 + v4 v1 v2)        κ = every η λ / r

At the minimum two, three or all four of a group are left, the largest. For two the answer is u; for three and four each
coordinate has a closed minimum, v_i = max(0, u_i - κ Σ of products of pairs of the others), so that a few passes go
down to it. The best of the three is taken. λ rises from 0 to `strength`; a group that is 2:4 may trade its weights as
long as λ rises. At the end masks are fixed at the two largest of four; `forced` says for how many groups that took
something away that was not zero.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.mask import Pattern, keep_best
from llmcompress.shelf import HALVES, Shelf
from llmcompress.training.schedule import Scheduled
from llmcompress.training.sparsity import Shapes
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.units import as_matrix

PATTERN = Pattern("n:m", 2, 4)
PASSES = 6  # over the coordinates of a group


class Proximal24(Scheduled):
    """Options of `train: proximal_24`."""

    shelf: ClassVar[Shelf] = Shelf(
        "during training", "two of four neighbouring weights", HALVES, "2:4 everywhere in the end"
    )

    strength: float = Field(1.0, gt=0, description="λ at the end; with more, fewer groups are forced")
    every: int = Field(5, ge=1, description="optimizer steps between proximal steps")

    @property
    def leaves(self) -> tuple[str, float] | None:
        """2:4 everywhere."""
        return str(PATTERN), 0.5

    def check_shapes(self, shapes: Shapes) -> None:
        """Raise ValueError if the input columns of a matrix are no multiple of four."""
        if odd := [name for name, (_, columns) in shapes.items() if columns % PATTERN.m]:
            raise ValueError(
                f"{odd[0]} has {shapes[odd[0]][1]} input columns, and 2:4 needs a multiple of 4; add it to `keep`"
            )

    def technique(self) -> Technique:
        """Groups of four go down to two."""
        return Proximal(self)


class Proximal(Technique):
    """Groups of four go down to two."""

    options: Any
    forced = 0.0  # share of groups with more than two weights when masks were fixed

    def after_step(self, step: int, learner: Learner) -> None:
        """The proximal step, if it is time; at the end, fix the masks."""
        if not self.options.turn(step, self.options.every):
            return
        reach = self.options.every * learner.rate * self.options.strength * self.options.done(step)
        found, groups = 0, 0
        with torch.no_grad():
            for name, weight in learner.weights.items():
                linear = learner.model.get_submodule(name.rpartition(".")[0])
                matrix = as_matrix(linear, weight)
                size = matrix.square().mean().sqrt().clamp(min=torch.finfo(weight.dtype).tiny)
                fours = (matrix / size).reshape(-1, PATTERN.m)
                matrix.copy_(size * shrunk(fours, reach / float(size)).reshape(matrix.shape))
                if step == self.options.end:
                    found += int((matrix.reshape(-1, PATTERN.m).count_nonzero(1) > PATTERN.n).sum())
                    groups += len(fours)
                    self.masks[name] = as_matrix(linear, keep_best(matrix.abs(), PATTERN, 0.5)).contiguous()
        self.forced = found / groups if groups else self.forced

    def state(self) -> dict[str, Tensor]:
        """Also how many were forced."""
        return super().state() | {"forced": torch.tensor(self.forced, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor], learner: Learner) -> None:
        """Also this."""
        super().load(state, learner)
        self.forced = float(state["forced"])

    def record(self) -> dict[str, Any]:
        """Also how many were forced."""
        return super().record() | {"forced": self.forced}


def triples(v: Tensor) -> Tensor:
    """R of groups v [4, n] >= 0; [n]."""
    a, b, c, d = v
    return a * b * (c + d) + c * d * (a + b)


def shrunk(u: Tensor, strength: float) -> Tensor:
    """The proximal step of `strength` R for groups u [n, 4] of any sign; [n, 4]."""
    size, order = u.abs().sort(dim=1, descending=True)
    size = size.T.contiguous()
    best, lowest = left(size, 2), size[2:].square().sum(0) / 2
    for stay in (3, 4):
        v = descended(size, stay, strength)
        value = (v - size).square().sum(0) / 2 + strength * triples(v)
        best, lowest = torch.where(value < lowest, v, best), torch.minimum(value, lowest)
    return torch.zeros_like(u).scatter_(1, order, best.T) * u.sign()


def left(size: Tensor, stay: int) -> Tensor:
    """size [4, n] with zeros for all but the first."""
    v = size.clone()
    v[stay:] = 0
    return v


def descended(size: Tensor, stay: int, strength: float) -> Tensor:
    """Where going down coordinate by coordinate ends, the smallest first; size: [4, n] in falling order."""
    v = left(size, stay)
    for _ in range(PASSES):
        for i in reversed(range(stay)):
            a, b, c = (v[j] for j in range(4) if j != i)
            v[i] = (size[i] - strength * (a * b + (a + b) * c)).clamp(min=0)
    return v
