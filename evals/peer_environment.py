"""The peer's virtual environment, made on first use and checked at each."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PEER = "llmcompressor==0.14.0.1"
# torch goes first and alone, so that a machine on which it is no CPU build is refused before gigabytes are fetched;
# the other two are the newest that the peer's wheel allows.
PEER_TORCH = "torch==2.13.0"
PEER_PINS = ["transformers==5.17.0", "compressed-tensors==0.19.0"]
PEER_VERSIONS = """
import json
from importlib.metadata import version
import torch
names = ["llmcompressor", "torch", "transformers", "compressed-tensors"]
print(json.dumps({"cuda": torch.version.cuda, **{name: version(name) for name in names}}))
"""


def peer_environment(cache: Path, pip_args: list[str]) -> tuple[Path, dict[str, Any]]:
    """Python of the peer's own virtual environment, made on first use, and the versions in it."""
    folder = cache / PEER.replace("==", "-")
    python = folder / "bin" / "python"
    ready = folder / "complete"
    if not ready.exists():
        sys.stderr.write(f"making {folder}\n")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        refuse_cuda(python, pip_args)
        pip(python, "install", "--quiet", PEER_TORCH, *pip_args)
        pip(python, "install", "--quiet", PEER_TORCH, PEER, *PEER_PINS)
        ready.touch()
    shown = subprocess.run([str(python), "-c", PEER_VERSIONS], check=True, capture_output=True, text=True).stdout
    versions = json.loads(shown)
    if versions.pop("cuda") is not None:
        raise SystemExit(f"{folder}: torch is a CUDA build; remove the folder and see --pip-args")
    return python, versions


def pip(python: Path, *arguments: str) -> str:
    """Run pip of that Python; returns its standard output."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def refuse_cuda(python: Path, pip_args: list[str]) -> None:
    """Stop before pip fetches CUDA libraries: they are gigabytes, and the comparison runs on the CPU."""
    shown = pip(python, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", PEER_TORCH, *pip_args)
    names = sorted(entry["metadata"]["name"] for entry in json.loads(shown)["install"])
    cuda = [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    if cuda:
        raise SystemExit(
            f"peer: pip would install {PEER_TORCH} with {len(cuda)} CUDA packages ({cuda[0]}, ...), "
            "expected a CPU build. Try --pip-args=--index-url=https://download.pytorch.org/whl/cpu"
        )
