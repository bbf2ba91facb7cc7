"""Is everything that a model needs in its files, in the sizes that its config says? Looked at in headers alone.

transformers warns about missing tensors and fills them, and with a quantizer looks at no shape; both would compute
something else. Files are somebody else's until they are checked.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from llmcompress.errors import FormatError
from llmcompress.safetensors_file import TensorInfo

HINT = "the files are damaged, or not of this config.json"


def check_modules(stored: Collection[str], modules: Iterable[str], leaves: set[str]) -> None:
    """Every module must have all tensors of its format; what is missing would be filled with anything.

    A module has two names where the checkpoint's differ from the model's; then one is the end of the other.
    """
    names = list(modules)
    found = {name for name in names if any(f"{name}.{leaf}" in stored for leaf in leaves)}
    for name in found:
        if missing := sorted(leaf for leaf in leaves if f"{name}.{leaf}" not in stored):
            raise FormatError(f"{name}: {missing[0]} is not in the files; they are damaged, or not of this config.json")
    for name in names:
        if name not in found and not any(f".{a}".endswith(f".{b}") for f in found for a, b in ((f, name), (name, f))):
            raise FormatError(f"{name}: none of its tensors is in the files, though config.json lists it")


def check_sizes(
    model: Any,
    stored: Mapping[str, TensorInfo],
    *,
    unsized: Collection[str] = (),
    sizes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Shape and presence of every tensor of a model that is on the meta device.

    unsized: names, in the model and in the files, of tensors whose sizes are the file's own.
    sizes: those that a tensor has in the files, where the model has other ones yet.
    A tensor that is missing is an error if all tensors of the files have found theirs; else the model may convert the
    others into it while loading, as it does with experts.
    """
    prefix = f"{model.base_model_prefix}."
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    missing, left = [], set(stored) - set(unsized)
    for name, tensor in model.named_parameters():
        if name in unsized:
            continue
        found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in stored), None)
        if found is None:
            missing += [] if name in tied else [name]
        elif stored[found].shape != (expected := (sizes or {}).get(name, tuple(tensor.shape))):
            raise FormatError(f"{found}: shape {list(stored[found].shape)}, the model expects {list(expected)}; {HINT}")
        left.discard(str(found))
    if missing and not left:
        raise FormatError(f"{missing[0]}: is not in the files; {HINT}")
