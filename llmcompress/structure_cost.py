"""What a structure step will take: its phases, in the terms of `cost.py`. Scoring is told apart in plans.

    embedding
    scoring    width  weights    2 block + judging: a group's weights and their scores in float32, one linear once more
                      inputs     2 block + hidden + the larger of passing and judging
                      gradients  the larger of that walk, and a block in float32 + moments + judging + hidden twice
               depth  2 block + passing + the hidden states of all candidates, or with losses the head and a window's
                      logits, in float32 twice
    changing   2 block + hidden + the larger of passing and compensation: the consumer three times in float32, its Gram
               matrix G, and beside that
                      mean           the sum that G is made of, m mᵀ, and G without that
                      least squares  G_KK + λ I, its factor, G_KD and what they give, all in float64
    proving

Where whole blocks go, changing is copying.
"""

from typing import Any

from llmcompress.cost import (
    PROOF_SAMPLES,
    Cost,
    Phase,
    block_bytes,
    cost_of,
    embedding,
    exact_hidden_bytes,
    gradients,
    gram_seconds,
    hidden_bytes,
    hidden_size,
    largest_block,
    pass_seconds,
    passing_bytes,
    proving,
    samples_and_length,
    speed,
    stored_bytes,
    table_bytes,
    tokens_of,
    vocabulary,
)
from llmcompress.structure import Depth
from llmcompress.structure.groups import Group
from llmcompress.structure_budget import StructurePlan


def scoring_of(plan: StructurePlan) -> Phase:
    """What finding out which units or blocks go will take; nothing where their zeros say it."""
    if isinstance(plan.step.options, Depth):
        return scoring_blocks(plan)
    return Phase() if getattr(plan.step.options, "zeros", None) else scoring_units(plan)


def predict(plan: StructurePlan) -> Cost:
    """What the step will take."""
    output = stored_bytes(plan.result.tensors.values(), plan.itemsize)
    changing = narrowing(plan) if plan.groups else carrying(plan)
    return cost_of(plan, output, [embedding(plan), plan.scoring, changing, proving(plan)])


def scoring_units(plan: StructurePlan) -> Phase:
    """Scores of the units within blocks."""
    score: Any = plan.step.options.score
    group = plan.groups[largest_group(plan)]
    sizes = sizes_of(plan, group)
    weights, block = sum(sizes), block_bytes(plan)
    judging = 4 * 2 * weights + 4 * max(sizes)  # copies of the weights, their scores, and what one of these is made of
    seconds = 0.0
    if score.within_block:  # every unit beside every other
        pairs = sum(each.units**2 for each in plan.groups.values())
        seconds = 2.0 * pairs * weights / group.units / speed(plan, "float32")
    if score.walk == "weights":
        return Phase(2 * block + judging, seconds)
    if score.walk == "inputs":
        seconds += 2 * pass_seconds(plan, tokens_of(plan))
        return Phase(2 * block + hidden_bytes(plan) + max(passing_bytes(plan), judging), seconds)
    samples, _ = samples_and_length(plan)
    share = score.windows(samples) / samples
    walk = gradients(plan, weights, 2, share)
    judging += 4 * block // plan.itemsize + 4 * 2 * weights + 2 * exact_hidden_bytes(plan, share)
    return Phase(max(walk.memory, judging), seconds + walk.seconds, walk.disk)


def scoring_blocks(plan: StructurePlan) -> Phase:
    """Scores of whole blocks."""
    score: Any = plan.step.options.score
    samples, length = samples_and_length(plan)
    windows, walks = score.effort(plan.count, plan.drop, samples)
    if not walks:
        return Phase()
    copies = int(windows * length) * hidden_size(plan) * plan.itemsize
    memory = 2 * block_bytes(plan) + copies + passing_bytes(plan)
    if score.looks_at_losses:
        memory = max(memory, table_bytes(plan) + copies + 2 * 4 * length * vocabulary(plan))
    return Phase(memory, pass_seconds(plan, walks * length))


def narrowing(plan: StructurePlan) -> Phase:
    """Every block is fed by those before it, changed, and run again."""
    how: str = plan.step.options.compensate  # type: ignore[attr-defined]  # of structures with groups
    columns, kept = columns_of(plan, largest_group(plan))
    held, seconds = 2 * block_bytes(plan) + hidden_bytes(plan), pass_seconds(plan, tokens_of(plan))
    solving = 3 * 4 * columns * hidden_size(plan)
    if how != "none":
        changed = [columns_of(plan, i) for i, group in plan.groups.items() if plan.widths[i] < group.units]
        seconds += pass_seconds(plan, tokens_of(plan)) * len(changed) / plan.count
        seconds += gram_seconds(plan, [before for before, _ in changed])
        solving += 4 * columns**2
        if how == "mean":
            solving += 3 * 4 * columns**2
        else:
            solving += 2 * 8 * kept * columns
            seconds += sum(solving_seconds(plan, *each) for each in changed)
    return Phase(held + max(passing_bytes(plan), solving), seconds)


def solving_seconds(plan: StructurePlan, columns: int, kept: int) -> float:
    """Least squares in a block, in float64 at half the speed: a factor, its solutions, and their product."""
    gone = columns - kept
    operations = kept**3 / 3 + 2.0 * kept**2 * gone + 2.0 * hidden_size(plan) * gone * kept
    return 2 * operations / speed(plan, "float32")


def carrying(plan: StructurePlan) -> Phase:
    """The blocks that stay are copied; the windows of the proof go through them."""
    _, length = samples_and_length(plan)
    return Phase(2 * block_bytes(plan) + passing_bytes(plan), pass_seconds(plan, PROOF_SAMPLES * length))


def largest_group(plan: StructurePlan) -> int:
    """The largest block, or the first one that has such units."""
    largest = largest_block(plan)
    return largest if largest in plan.groups else min(plan.groups)


def columns_of(plan: StructurePlan, index: int) -> tuple[int, int]:
    """Columns that the consumer in a block reads, and how many of them stay."""
    group = plan.groups[index]
    return group.columns.numel(), group.columns.shape[1] * plan.widths[index]


def sizes_of(plan: StructurePlan, group: Group) -> list[int]:
    """Weights of the linears of a group that go with its units; they read and write hidden states."""
    return [table.numel() * hidden_size(plan) for table in (*group.rows.values(), group.columns)]
