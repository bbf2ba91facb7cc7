"""Budgets: how a sparsity for a whole model is spread over its matrices.

uniform  the same for all
erk      Erdős-Rényi-Kernel, Mocanu et al. 2018 (arXiv:1707.04780), Evci et al. 2020 (arXiv:1911.11134): density of a
         matrix [out, in] proportional to (in + out) / (in out), at most 1
owl      outlier-weighed layerwise, Yin et al. 2023 (arXiv:2310.05175): a block keeps more the larger the share of
         its scores |W_ij| ||x_j|| above M times their mean
global   the highest scores of all matrices together stay
"""

from collections.abc import Mapping

from llmcompress.lazy import Tensor, torch

BINS = 1 << 15  # of a float32 >= 0, its exponent and the first 7 bits of its mantissa


def erk_densities(shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
    """Density of each matrix [out, in]; their weighted mean is 1 - sparsity.

    The factor eps of density = eps (in + out) / (in out) follows from the total; matrices whose density would pass 1
    stay dense, and eps is solved anew for the others.
    """
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    wanted = (1 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items() if name not in dense}
        left = wanted - sum(sizes[name] for name in dense)
        eps = left / sum(value * sizes[name] for name, value in raw.items()) if raw else 0.0
        full = {name for name, value in raw.items() if eps * value > 1}
        if not full:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense |= full


def owl_sparsities(
    outliers: Mapping[int, float], sizes: Mapping[int, int], sparsity: float, spread: float
) -> dict[int, float]:
    """Sparsity of each block from its share of outliers; their mean, weighted by `sizes`, is `sparsity`.

    The shares are stretched to densities from 0 to 2 `spread` and moved to the wanted mean (section 4.2 of the paper).
    Blocks with equal shares get equal sparsities.
    """
    low, high = min(outliers.values()), max(outliers.values())
    reach = high - low if high > low else 1.0
    density = {block: 2 * spread * ((share - low) / reach) for block, share in outliers.items()}
    mean = sum(density[block] * sizes[block] for block in density) / sum(sizes[block] for block in density)
    return {block: sparsity + mean - value for block, value in density.items()}


def score_histogram(score: Tensor) -> Tensor:
    """How many scores >= 0 are in each bin; [BINS] int64. A bin is as wide as a bfloat16 step, 0.8% at most."""
    bins = score.float().contiguous().view(torch.int32) >> 16
    return torch.bincount(bins.flatten().clamp_(min=0), minlength=BINS)


def global_counts(histograms: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    """How many weights of each matrix are among the `keep` highest scores of all; the sum is exact.

    The bin in which the limit falls is shared in proportion to what each matrix has in it, remainders to the largest.
    """
    total = torch.stack(list(histograms.values())).sum(0)
    above = total.flip(0).cumsum(0).flip(0)  # in this bin or a higher one
    edge = int((above >= keep).nonzero().max()) if keep else BINS - 1
    counts = {name: int(found[edge + 1 :].sum()) for name, found in histograms.items()}
    left = keep - sum(counts.values())
    inside = {name: int(found[edge]) for name, found in histograms.items()}
    whole = max(1, sum(inside.values()))
    for name in counts:
        counts[name] += left * inside[name] // whole
    by_remainder = sorted(counts, key=lambda name: -(left * inside[name] % whole))
    for name in by_remainder[: keep - sum(counts.values())]:
        counts[name] += 1
    return counts
