"""Skeleton: every stripe of a weight matrix learns a factor of its own, and stripes whose factor fell away go. Pruning
filter in filter (PFF), Meng et al. 2020, arXiv:2009.14410.

    minimize over W and S   L(W ⊙ S) + λ ||S||_1        |S_ij| < δ: the stripe falls, S_ij = 0 and W_ij = 0 from then on

In a convolution a stripe is one of the k x k places of a filter. A linear has no such places; here W_ij is a run of
`stripe` input columns of one output row, and S [out, in / stripe] holds a number for each, 1 at first. As in
`group_lasso` the L1 norm is followed by its proximal step, S <- sign(S) max(0, |S| - λ η), with the learning rate η of
S, which is `speed` times that of the weights. After the last step S is multiplied into W, so nothing of it is left.

Which matrices lose how much is learned. With `density`, as many stripes as are above it go at the end, those of the
smallest |S| of all. A matrix never loses its last stripe, as nothing would pass through it any more and no gradient
could bring one back: the largest factor of each is held at δ. The record names the matrices that came to that.
What a product with such a matrix has to compute is in `stripes.py`.
"""

from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import Shelf
from llmcompress.training.schedule import Scheduled
from llmcompress.training.sparsity import Shapes, best, best_of_all
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.units import as_matrix

if TYPE_CHECKING:
    from torch import nn


class Skeleton(Scheduled):
    """Options of `train: skeleton`."""

    shelf: ClassVar[Shelf] = Shelf(
        "during training",
        "stripes of a row",
        "files at once; fewer operations, but no kernel here is faster by it",
        "stripes that fell stay exactly zero; a plain product of packed stripes is that of the masked matrix",
    )

    stripe: int = Field(16, ge=2, description="input columns of a row that have one factor")
    strength: float = Field(0.03, gt=0, description="λ: how hard factors are pulled to zero")
    threshold: float = Field(0.05, gt=0, lt=1, description="δ: a factor below it falls")
    speed: float = Field(10.0, gt=0, description="learning rate of factors, in those of weights")
    density: float | None = Field(None, gt=0, lt=1, description="share of the stripes that stays at most")

    @property
    def leaves(self) -> tuple[str, float] | None:
        """Whole stripes; how many is learned."""
        return f"block:{self.stripe}", 0.0 if self.density is None else 1 - self.density

    def check_shapes(self, shapes: Shapes) -> None:
        """Raise ValueError if the input columns of a matrix are not made of stripes."""
        if odd := [name for name, (_, columns) in shapes.items() if columns % self.stripe]:
            raise ValueError(
                f"stripe: {odd[0]} has {shapes[odd[0]][1]} input columns, which are not made of stripes of "
                f"{self.stripe}; use a divisor of all widths"
            )
        stripes = sum(map(prod, shapes.values())) // self.stripe
        if self.density is not None and round(self.density * stripes) < len(shapes):
            raise ValueError(
                f"density: {self.density:g} leaves {round(self.density * stripes)} stripes to {len(shapes)} matrices, "
                f"and each needs one; use at least {len(shapes) / stripes:.2g}"
            )

    def technique(self) -> Technique:
        """Stripes that fall."""
        return Stripes(self)


class Stripes(Technique):
    """Stripes that fall."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """Put a linear with a skeleton in the place of each."""
        self.striped: dict[str, Any] = {}
        for name in learner.weights:
            path = name.removesuffix(".weight")
            linear = learner.model.get_submodule(path)
            self.striped[name] = striped(linear, self.options.stripe, self.options.speed)
            put(learner.model, path, self.striped[name])

    def after_step(self, step: int, learner: Learner) -> None:
        """Shrink the factors, and let fall what is below the threshold."""
        options = self.options
        if not options.active(step):
            return
        for module in self.striped.values():
            shrink(module.skeleton, learner.rate * options.strength)
        sizes = {name: self.held(name) for name in self.striped}
        stay = {name: size >= options.threshold for name, size in sizes.items()}
        if step == options.end and options.density is not None:
            most = round(options.density * sum(size.numel() for size in sizes.values()))
            stay = {name: stay[name] & mask for name, mask in best_of_all(sizes, most).items()}
        for name, mask in stay.items():
            self.keep_only(name, mask)

    def held(self, name: str) -> Tensor:
        """|S| of a matrix [out * in / stripe], infinite for the largest, which is held at δ, in place."""
        skeleton, least = self.striped[name].skeleton.detach(), self.options.threshold / self.options.speed
        size = skeleton.abs()
        if (mask := self.masks.get(factors_of(name))) is not None:
            size = size.masked_fill(~mask, -1)  # one that fell is no candidate, though all others may be at zero
        largest = best(size, 1)
        skeleton.copy_(torch.where(largest & (size < least), least * (1 - 2 * skeleton.signbit().float()), skeleton))
        return (self.options.speed * size).masked_fill(largest, torch.inf)

    def keep_only(self, name: str, stay: Tensor) -> None:
        """Mask what else there is of the stripes of a matrix, and their factors; stay: [out * in / stripe] bool."""
        module, factors = self.striped[name], factors_of(name)
        before = self.masks.get(factors, torch.ones_like(stay))
        if bool((before & ~stay).any()):
            self.masks[factors] = before & stay
            self.masks[name] = module.stripes(self.masks[factors]).contiguous()

    def finish(self, learner: Learner) -> None:
        """Multiply the skeletons into the weights, and put the linears back."""
        for name, module in self.striped.items():
            with torch.no_grad():
                module.linear[0].weight.copy_(module.weight * module.stripes(module.factors()))
            put(learner.model, name.removesuffix(".weight"), module.linear[0])

    def record(self) -> dict[str, Any]:
        """Density of all matrices together, and those with one stripe alone."""
        fell = sum(int((~self.masks[name]).sum()) for name in self.striped if name in self.masks)
        total = sum(module.weight.numel() for module in self.striped.values())
        alone = [n for n in self.striped if n in self.masks and int(self.masks[n].sum()) == self.options.stripe]
        return super().record() | {"density": 1 - fell / total, "one_stripe": alone}


def factors_of(name: str) -> str:
    """Name of the factors of a matrix among the parameters, beside its weight."""
    return name.removesuffix("weight") + "skeleton"


def striped(linear: Any, stripe: int, speed: float) -> "nn.Module":
    """A linear of the same parameters, with a factor for each stripe of its weight."""
    from torch import nn

    class Striped(nn.Module):
        """y = (W ⊙ S) x + b, with S = speed * skeleton."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = (linear,)  # in a tuple it is no child, which would have the parameters twice
            self.weight, self.bias = linear.weight, linear.bias
            self.rows = len(as_matrix(linear, linear.weight))
            count = linear.weight.numel() // stripe
            self.skeleton = nn.Parameter(torch.full((count,), 1 / speed, device=linear.weight.device))

        def factors(self) -> Tensor:
            """S, [out * in / stripe]."""
            return speed * self.skeleton

        def stripes(self, values: Tensor) -> Tensor:
            """values [out * in / stripe] for every weight of their stripes, in the shape of the weight."""
            return as_matrix(linear, values.reshape(self.rows, -1).repeat_interleave(stripe, 1))

        def forward(self, x: Tensor) -> Tensor:
            """For inputs [..., in]."""
            weight = self.weight * self.stripes(self.factors())
            return nn.functional.linear(x, as_matrix(linear, weight), self.bias)

    return Striped()


def put(model: "nn.Module", path: str, module: "nn.Module") -> None:
    """Put a module in the place of another."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def shrink(skeleton: Tensor, reach: float) -> None:
    """The proximal step of reach ||.||_1, in place."""
    with torch.no_grad():
        skeleton.copy_(skeleton.sign() * (skeleton.abs() - reach).clamp(min=0))
