"""kernels/ as a kernel repository of the Hub: its files fit together, and a build loads beside the package."""

import ast
import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import build_hub
import llmcompress_kernels
import pytest
import torch

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"
PACKAGE = Path(llmcompress_kernels.__file__).parent
NOT_SHIPPED = {"py.typed"}
REGISTER = {"custom_op", "triton_op", "define", "impl", "register_fake", "register_kernel", "Library"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("hub")
    build_hub.build(output, "somebody/some-kernels")
    return output


def load(variant: Path) -> ModuleType:
    """As the `kernels` library does: under the name of the build."""
    facts = json.loads((variant / "metadata.json").read_text())
    spec = importlib.util.spec_from_file_location(facts["id"], variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[facts["id"]] = module
    spec.loader.exec_module(module)
    return module


def test_build_toml_names_the_package():
    config = build_hub.configuration()
    general = config["general"]
    assert set(config) == {"general", "torch-noarch"}
    assert PACKAGE.name == general["name"].replace("-", "_")
    assert PACKAGE.parent == KERNELS / "torch-ext"
    license_ = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert general["license"] == license_
    owner, _, name = general["hub"]["repo-id"].partition("/")  # without it the Hub's builder does not publish
    assert owner
    assert name == general["name"]
    assert "name: kernels" in (KERNELS / "CARD.md").read_text()
    assert f"license: {license_.lower()}" in (KERNELS / "CARD.md").read_text()


def test_every_file_of_the_package_is_built():
    """A file with an extension that build.toml does not name would be missing on the Hub."""
    shipped = set(build_hub.package_files(build_hub.configuration()))
    files = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert files - shipped == NOT_SHIPPED


def test_card_names_every_operator():
    card = (KERNELS / "CARD.md").read_text(encoding="utf-8")
    for path in PACKAGE.glob("*/launch.py"):
        assert f"`{path.parent.name}`" in card


def test_operators_are_registered_in_the_namespace_of_the_build():
    """A literal "llmcompress::..." would clash with the same operator of another build."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REGISTER:
                literal = [a.value for a in node.args if isinstance(a, ast.Constant) and "::" in str(a.value)]
                assert not literal, f"{path}:{node.lineno}: {literal}, expected add_op_namespace_prefix of _ops.py"


def test_a_build_has_what_the_hub_asks_for(built):
    assert {path.name for path in (built / "build").iterdir()} == {"torch-cpu", "torch-cuda"}
    for backend in ("cpu", "cuda"):
        variant = built / f"build/torch-{backend}"
        facts = json.loads((variant / "metadata.json").read_text())
        assert facts["id"].isidentifier()
        assert facts["backend"]["type"] == backend
        files = {p.relative_to(variant).as_posix(): p.read_bytes() for p in variant.rglob("*") if p.is_file()}
        del files["metadata.json"]
        hashes = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()}
        assert facts["digest"] == {"algorithm": "sha256", "files": hashes}
    assert 'get_kernel("somebody/some-kernels"' in (built / "README.md").read_text()


def test_other_content_gets_another_namespace():
    config, files = build_hub.configuration(), {"a.py": b"1", "b.py": b"2"}
    names = {
        build_hub.identifier(config, backend, content)
        for backend in ("cpu", "cuda")
        for content in (files, files | {"a.py": b"3"}, {"a.py": b"1b.py 1 2"})
    }
    assert len(names) == 6
    assert build_hub.identifier(config, "cpu", files) in names


def test_a_build_loads_beside_the_package_and_computes_the_same(built):
    module = load(built / "build/torch-cpu")
    namespace = module.__name__
    assert hasattr(getattr(torch.ops, namespace), "int4_linear")
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(-(2**31), 2**31, (24, 12), generator=generator, dtype=torch.int64).to(torch.int32)
    scale = (torch.rand(24, 3, generator=generator) + 0.5).to(torch.bfloat16)
    x = torch.randn(3, 96, generator=generator).to(torch.bfloat16)
    found, expected = (
        made.int4_linear(x, *made.from_pack_quantized(packed, scale, None, 96))
        for made in (module, llmcompress_kernels)
    )
    assert torch.equal(found, expected)
    assert module.int4_linear is not llmcompress_kernels.int4_linear


def test_a_build_replaces_the_one_before(built, tmp_path):
    build_hub.build(tmp_path, "a/b")
    stray = tmp_path / "build/torch-cpu/stray.py"
    stray.write_text("")
    build_hub.build(tmp_path, "a/b")
    assert not stray.exists()


@pytest.mark.slow
@pytest.mark.network
def test_the_kernels_library_loads_it(tmp_path):
    """Makes an environment with `kernels` from PyPI."""
    program = [sys.executable, str(ROOT / "evals/load_hub_kernel.py"), "--cache", str(tmp_path)]
    ran = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
