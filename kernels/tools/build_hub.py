"""Lay this folder out as a kernel of the Hugging Face Hub, as its `kernels` library loads it.

    python kernels/tools/build_hub.py outputs/hub-kernel [--repo-id your-name/llmcompress-kernels]

Makes OUTPUT/build/torch-cpu and OUTPUT/build/torch-cuda: the package, a `_ops.py` whose namespace depends on its
content, and `metadata.json`; and OUTPUT/README.md, the card. The Hub's own builder does the same and more, but needs
Nix (`kernel-builder build-and-upload`, which reads build.toml and flake.nix); this needs Python alone, so that tests
can load what a user of the Hub would. Nothing is compiled here: Triton and the user's C++ compiler do that on first
use.
"""

import argparse
import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[1]


def configuration() -> dict[str, Any]:
    """build.toml."""
    return tomllib.loads((KERNELS / "build.toml").read_text(encoding="utf-8"))


def package_files(config: dict[str, Any]) -> dict[str, bytes]:
    """Path in the package to content, of all files with an extension that build.toml names."""
    package = KERNELS / "torch-ext" / config["general"]["name"].replace("-", "_")
    extensions = {f".{extension}" for extension in config["torch-noarch"]["pyext"]}
    found = sorted(path for path in package.rglob("*") if path.suffix in extensions)
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in found}


def identifier(config: dict[str, Any], backend: str, files: dict[str, bytes]) -> str:
    """A module name and operator namespace that no other content has."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    return f"_{config['general']['name'].replace('-', '_')}_{backend}_{digest.hexdigest()[:12]}"


def operators_module(namespace: str) -> bytes:
    """`_ops.py` of a build: the same functions as in the package, with another namespace."""
    text = f'''"""Made by the build: the namespace of these operators."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(name: str) -> str:
    return f"{namespace}::{{name}}"
'''
    return text.encode()


def metadata(config: dict[str, Any], backend: str, namespace: str, files: dict[str, bytes]) -> dict[str, Any]:
    """metadata.json of a build, as the Hub's kernel requirements describe it."""
    general = config["general"]
    hashes = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()}
    return {
        "name": general["name"],
        "id": namespace,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }


def build(output: Path, repo_id: str) -> None:
    """Write all variants and the card; what was in `output`/build before is replaced."""
    config = configuration()
    files = package_files(config)
    shutil.rmtree(output / "build", ignore_errors=True)
    for backend in config["general"]["backends"]:
        namespace = identifier(config, backend, files)
        built = files | {"_ops.py": operators_module(namespace)}
        facts = json.dumps(metadata(config, backend, namespace, built), indent=2)
        for name, content in (built | {"metadata.json": facts.encode()}).items():
            path = output / "build" / f"torch-{backend}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    card = (KERNELS / "CARD.md").read_text(encoding="utf-8").replace("{{ repo_id }}", repo_id)
    (output / "README.md").write_text(card, encoding="utf-8")


def main() -> int:
    """Build, and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--repo-id", default="your-name/llmcompress-kernels", help="what the card says to load")
    asked = parser.parse_args()
    build(asked.output, asked.repo_id)
    print(*sorted(path.parent for path in asked.output.glob("build/*/metadata.json")), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
