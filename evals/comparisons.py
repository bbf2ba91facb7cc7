"""What is compared over several seeds: groups of trials that end with the same number of parameters.

Everything is trained for the same number of steps, and pruning after training comes in two kinds that have seen as many
tokens: once after all of them, and after two thirds with the last third to recover. Schedules that are given in steps
in the recipes of tiny-llama shrink with the number of steps. The lottery ticket trains several times; what it is to be
compared with has a row of its own that was trained for as long as all its trainings together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from trials import Trial, seeded

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes/tiny-llama"
IN_STEPS = ("warmup", "every", "rewind")  # options that shrink with the number of steps
ROUNDS = 2  # of the lottery ticket
OTHER_SEED = 1000  # between a ticket and the weights that its mask is given to
SPARSE = {  # trial -> recipe of techniques that take single weights while they train or before
    "static": "random-80",
    "static-uniform": "random-80-uniform",
    "static-snip": "random-80-snip",
    "set": "set-80",
    "rigl": "rigl-80",
    "gradual": "gradual-80",
}
HALF = {"structure": "mlp_channel", "score": "fluctuation", "ratio": 0.5, "of": "group"}


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that answer one question; all are compared with the first."""

    title: str
    rows: Mapping[str, str]  # trial -> what it is


def sparse_group(percent: int) -> Group:
    """Masks of single weights."""
    return Group(
        f"{percent}% of the decoder linears' weights gone",
        {
            f"static-{percent}": "static random mask, ERK",
            f"static-uniform-{percent}": "static random mask, the same density everywhere",
            f"static-snip-{percent}": "static random mask, as many of each matrix as SNIP would keep",
            f"set-{percent}": "SET: masks move, at random",
            f"rigl-{percent}": "RigL: masks move, by gradients",
            f"gradual-{percent}": "gradual: dense at first, then ever fewer, by magnitude",
            f"magnitude-{percent}": "after training: magnitude",
            f"sparsegpt-{percent}": "after training: SparseGPT",
            f"sparsegpt-{percent}-recover": "after two thirds: SparseGPT, then trained on",
        },
    )


GROUPS = (
    sparse_group(80),
    sparse_group(90),
    Group(
        f"a lottery ticket of {ROUNDS} rounds, 80% gone",
        {
            "anew-80": "the ticket's mask with other random weights",
            "ticket-80": "the ticket: the mask with its own early weights",
            "long-magnitude-80": "trained as long as all rounds, then magnitude",
            "long-sparsegpt-80": "trained as long as all rounds, then SparseGPT",
        },
    ),
    Group(
        "half of the MLP channels gone",
        {
            "norm": "uniform: in every block those of the smallest norm (soft pruning)",
            "fpgm": "uniform: those nearest to the geometric median (FPGM)",
            "dsa": "as many in each block as DSA learns, by norm",
            "width": "after training: fluctuation scores and least squares",
            "width-recover": "after two thirds: the same, then trained on",
        },
    ),
)


def trials(steps: int, seeds: list[int]) -> list[Trial]:
    """Every trial of every seed; those that others go on from come first."""
    return [Trial(name, seed, drawn(values, seed)) for seed in seeds for name, values in recipes(steps).items()]


def drawn(values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """With seeds; weights for a mask that is given are not those that it was found with."""
    return seeded(values, seed + OTHER_SEED if "masked" in {step.get("train") for step in values["steps"]} else seed)


def recipes(steps: int) -> dict[str, dict[str, Any]]:
    """Name -> plain values."""
    base, third = recipe("dense", steps), steps // 3
    [dense] = base["steps"]
    recover = dense | {"start": "model", "steps": third, "learning_rate": 0.002, "warmup": max(1, third // 40)}
    ticket = recipe("lottery-ticket-80", steps) | {"output": {"format": "dense"}}  # as a mask, it is read by its zeros
    [rounds] = ticket["steps"]
    rounds |= {"rounds": ROUNDS, "fraction": round(1 - 0.2 ** (1 / ROUNDS), 6)}
    rounds["steps"] = (steps - rounds["rewind"]) * (ROUNDS + 1) + rounds["rewind"]

    def after(model: str, *more: dict[str, Any]) -> dict[str, Any]:
        return base | {"model": f"@{model}", "steps": list(more)}

    found = {
        "dense": base,
        "ticket-80": ticket,
        "dense-long": base | {"steps": [dense | {"steps": rounds["steps"]}]},
        "dense-part": base | {"steps": [dense | {"steps": steps - third}]},
        "anew-80": base | {"steps": [dense | {"train": "masked", "mask": "@ticket-80"}]},
    }
    for percent in (80, 90):
        gone = percent / 100
        for name, recipe_name in SPARSE.items():
            found[f"{name}-{percent}"] = recipe(recipe_name, steps, density=round(1 - gone, 2))
        found[f"magnitude-{percent}"] = after("dense", pruned("magnitude", gone))
        found[f"sparsegpt-{percent}"] = after("dense", pruned("sparsegpt", gone))
        found[f"sparsegpt-{percent}-recover"] = after("dense-part", pruned("sparsegpt", gone), recover)
    found |= {f"long-{each}-80": after("dense-long", pruned(each, 0.8)) for each in ("magnitude", "sparsegpt")}
    found["norm"] = recipe("geometric-median", steps, by="norm")
    found["fpgm"] = recipe("geometric-median", steps)
    found["dsa"] = recipe("dsa", steps, units=["mlp_channel"])
    found["dsa"]["steps"] = [step for step in found["dsa"]["steps"] if step.get("structure") != "kv_group"]
    found["width"] = after("dense", HALF)
    found["width-recover"] = after("dense-part", HALF, recover)
    return found


def recipe(name: str, steps: int, **options: Any) -> dict[str, Any]:
    """A recipe of tiny-llama, its training of another length and with other options."""
    values: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    first, *rest = values["steps"]
    whole = 1200
    shorter = {key: max(1, round(first[key] * steps / whole)) for key in IN_STEPS if key in first}
    return values | {"steps": [first | shorter | {"steps": steps} | options, *rest]}


def pruned(method: str, share: float) -> dict[str, Any]:
    """A step that takes a share of each matrix."""
    return {"method": method, "sparsity": share, "pattern": "layer"}
