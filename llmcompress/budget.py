"""Budgets: how a sparsity for a whole model is spread over its matrices.

uniform  the same for all
erk      Erdős-Rényi-Kernel, Mocanu et al. 2018 (arXiv:1707.04780), Evci et al. 2020 (arXiv:1911.11134): density of a
         matrix [out, in] proportional to (in + out) / (in out), at most 1
owl      outlier-weighed layerwise, Yin et al. 2023 (arXiv:2310.05175): a block keeps more the larger the share of
         its scores |W_ij| ||x_j|| above M times their mean
"""

from collections.abc import Mapping


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
