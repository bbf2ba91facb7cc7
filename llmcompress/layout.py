"""Where the decoder blocks and their matrices are in a checkpoint, by the names and shapes of its tensors alone."""

import re

from llmcompress.errors import PlanError
from llmcompress.recipe import matches
from llmcompress.source import ModelSource

CONV1D_MODELS = ("gpt2",)  # model types that keep weights as [in, out]; checked against the modules before a run


def find_block_path(source: ModelSource) -> tuple[str, int]:
    """Path of the decoder blocks, and how many: numbered 0 .. num_hidden_layers - 1 without a gap."""
    count = source.config.get("num_hidden_layers", source.config.get("n_layer"))
    if not isinstance(count, int) or count < 1:
        raise PlanError(f"{source.name}: config.json says num_hidden_layers is {count!r}, expected a positive number")
    numbers: dict[str, set[int]] = {}
    for name in source.tensors:
        for found in re.finditer(r"\.?(?<![^.])(\d+)\.", name):
            numbers.setdefault(name[: found.start(1)].rstrip("."), set()).add(int(found[1]))
    fitting = [path for path, found in numbers.items() if count and found == set(range(count))]
    if not fitting:
        raise PlanError(
            f"{source.name}: no {count} numbered decoder blocks among its {len(source.tensors)} tensors "
            f"(num_hidden_layers is {count}); is the checkpoint complete?"
        )
    return min(fitting, key=lambda path: path.count(".")), int(count)


def block_index(name: str, blocks: str) -> int:
    """Number of the block that a tensor or module is in."""
    return int(name[len(blocks) + 1 :].split(".", 1)[0])


def block_linears(source: ModelSource, blocks: str, transposed: bool) -> dict[str, tuple[int, int]]:
    """Module path -> [out, in] of every matrix in the blocks, experts left out."""
    found = {}
    for name, info in source.tensors.items():
        if name.startswith(blocks + ".") and name.endswith(".weight") and len(info.shape) == 2 and not is_expert(name):
            rows, columns = info.shape
            found[name.removesuffix(".weight")] = (columns, rows) if transposed else (rows, columns)
    return dict(sorted(found.items(), key=lambda item: (block_index(item[0], blocks), item[0])))


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to a mixture of experts."""
    return ".experts." in name


def refuse_experts(source: ModelSource, blocks: str, keep: list[str]) -> None:
    """Experts are fused 3-D tensors in memory, which no method takes yet; they must be kept by name."""
    for name, info in source.tensors.items():
        fused = is_expert(name) or len(info.shape) == 3
        if name.startswith(blocks + ".") and fused and not matches(name.removesuffix(".weight"), keep):
            experts = name[: name.index(".experts.")] + ".experts" if is_expert(name) else name.removesuffix(".weight")
            raise PlanError(
                f"{experts}: a mixture of experts, which transformers holds as fused 3-D tensors that no method "
                f"compresses yet (found {name} {list(info.shape)}); to keep experts and routers dense and compress the "
                'rest, set `keep: [lm_head, "*.experts.*", "*.gate"]`'
            )
