"""What a run of method steps will take: its phases, in the terms of `cost.py`.

    embedding
    surveying    only if a method looks at the dense model first: at inputs, or at gradients
    compressing  2 block + hidden + Gram matrices + statistics of gradients + weights and masks that a later step of the
                 block needs + the larger of
                 - passing
                 - the largest group of stacked weights, three times in float32, and a factor of its Gram matrix
    proving

Statistics are those of the largest block.
"""

from math import prod
from typing import TYPE_CHECKING

from llmcompress.cost import (
    HEADER,
    Cost,
    Phase,
    block_bytes,
    cost_of,
    embedding,
    gradients,
    gram_seconds,
    hidden_bytes,
    largest_block,
    pass_seconds,
    passing_bytes,
    proving,
    speed,
    tokens_of,
)
from llmcompress.stats import InputGram, InputSquares

if TYPE_CHECKING:
    from llmcompress.plan import Plan, PlannedLinear


def predict(plan: "Plan") -> Cost:
    """What the run will take."""
    saved = sum(linear.before_bytes - linear.after_bytes for linear in plan.linears)
    tensors = len(plan.source.tensors) + 3 * len(plan.linears)
    output = plan.before_bytes - saved + HEADER * tensors
    return cost_of(plan, output, [embedding(plan), surveying(plan), compressing(plan), proving(plan)])


def compressing(plan: "Plan") -> Phase:
    """Statistics of a block, its methods, and the passes of what it was and of what it becomes."""
    largest = largest_block(plan)
    first = [linear for linear in plan.linears if linear.block == largest]
    grams = sum(4 * linear.shape[1] ** 2 for linear in first if uses_gram(linear))
    looked_at = sum(4 * linear.shape[1] ** 2 for linear in first if "inputs" in plan.survey)
    waiting = sum(
        (plan.itemsize + 1) * prod(x.shape) for x in first if len(x.steps) > 1 and any(m.prunes for m in x.methods)
    )
    waiting += sum(4 * prod(linear.shape) for linear in first if uses_gradients(linear))
    solving = max((solving_bytes(linear) for linear in first), default=0)
    held = 2 * block_bytes(plan) + hidden_bytes(plan) + max(looked_at, grams + waiting)
    inputs = {(x.block, x.shape[1]) for x in plan.linears if any(m.needs is InputGram for m in x.methods)}
    seconds = (2 if plan.needs_data else 1) * pass_seconds(plan, tokens_of(plan))
    seconds += gram_seconds(plan, [columns for _, columns in inputs])
    return Phase(
        held + max(solving, passing_bytes(plan)), seconds + sum(solve_seconds(plan, linear) for linear in plan.linears)
    )


def surveying(plan: "Plan") -> Phase:
    """The walks over the dense model; where only inputs are looked at, compressing needs as much memory."""
    seconds = 2 * pass_seconds(plan, tokens_of(plan)) if "inputs" in plan.survey else 0.0
    if "gradients" not in plan.survey:
        return Phase(seconds=seconds)
    surveyed = [(linear.block, prod(linear.shape)) for linear in plan.linears if uses_gradients(linear)]
    largest = largest_block(plan)
    walk = gradients(plan, sum(size for block, size in surveyed if block == largest), 1)
    return Phase(walk.memory, walk.seconds + seconds, walk.disk + 4 * sum(size for _, size in surveyed))


def solving_bytes(linear: "PlannedLinear") -> int:
    """What a method holds while it works on a linear, and on one other of the same shape that shares its input."""
    rows, columns = linear.shape
    factor = 4 * columns**2 * 3 // 2 if uses_gram(linear) else 0
    return 3 * 2 * 4 * rows * columns + factor


def solve_seconds(plan: "Plan", linear: "PlannedLinear") -> float:
    """Time of the methods themselves on one linear: products with the Gram matrix, and passes over the weights."""
    rows, columns = linear.shape
    products = sum(method.products for method in linear.methods) * rows * columns**2
    passes = sum(method.passes for method in linear.methods) * rows * columns
    return products / speed(plan, "float32") + passes / 1.5e9


def uses_gram(linear: "PlannedLinear") -> bool:
    """Whether a Gram matrix is gathered for this linear, if only of a sample."""
    return any(method.needs in (InputGram, InputSquares) for method in linear.methods)


def uses_gradients(linear: "PlannedLinear") -> bool:
    """Whether statistics of its gradient are gathered."""
    return any("gradients" in method.survey for method in linear.methods)
