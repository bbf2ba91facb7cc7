"""Proof of loading, run as a script in a clean process: `python -I reload.py FOLDER EXPECTED`.

Imports transformers, which imports compressed-tensors, and nothing of llmcompress. Loads FOLDER as any user would and
compares, with what the run decided (EXPECTED, a safetensors file):

    tokens [n, length] int64, positions [m] int64, logits [n, m, vocabulary]
    metadata "digests": JSON, module path -> sha256 of the weight's bytes

Prints one JSON object.
"""

import hashlib
import json
import sys
from typing import Any

import torch
import transformers
from safetensors import safe_open


def main(folder: str, expected: str) -> dict[str, Any]:
    """Load, run, compare."""
    torch.set_grad_enabled(False)
    with safe_open(expected, "pt") as file:
        tokens, positions, wanted = (file.get_tensor(name) for name in ("tokens", "positions", "logits"))
        digests = json.loads(file.metadata()["digests"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted.dtype, local_files_only=True).eval()
    found = torch.cat([model(row[None], use_cache=False).logits[:, positions] for row in tokens])
    different = [name for name, digest in digests.items() if digest != sha256(model.get_submodule(name).weight)]
    difference = found.float() - wanted.float()
    return {
        "engine": f"transformers {transformers.__version__}",
        "compressed_tensors": version("compressed_tensors"),
        "tokens": found.shape[0] * found.shape[1],
        "max_abs_difference": float(difference.abs().max()),
        "relative_rms": float(difference.norm() / wanted.float().norm()),
        "top1_agreement": float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "weights": len(digests),
        "weights_different": different,
        "imported_llmcompress": "llmcompress" in sys.modules,
    }


def sha256(tensor: torch.Tensor) -> str:
    """Digest of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest()


def version(module: str) -> str | None:
    """Version of a module that was imported on the way."""
    return getattr(sys.modules.get(module), "__version__", None)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
