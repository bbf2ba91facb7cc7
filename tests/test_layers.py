"""The architecture, held by tests: imports point down, the package is light, sources run no foreign code."""

import ast
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

import llmcompress
from llmcompress.methods import METHODS, Pruner

PACKAGE = Path(llmcompress.__file__).parent
ROOT = PACKAGE.parent

LAYERS = [  # a module imports from its own layer and from those above it in this list
    "errors files heap thresholds shelf options catalog engines progress quiet reload lazy adapter "
    "modeling_llmcompress",
    "grid mask budget stats histogram weight safetensors_file gguf_header",  # tensor maths and file headers
    "methods formats runtime teal eviction",
    "source gguf_source hub_source new_model cached text calibrate arch building fused stream checkpoint gradients",
    "structure training at_runtime",
    "recipe",
    "layout plan machine assignment packed_source structure_budget depth_plan width_plan structure_plan hidden_plan "
    "training_plan adapter_plan runtime_plan stages cost method_cost structure_cost proof suite perplexity "
    "offline_tasks tasks evaluate inspection report hub",
    "generation speed bench compress survey results job structure_job hidden_job training_job adapter_job runtime_job "
    "run export pad tables",
    "cli __main__",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
FILES = sorted(PACKAGE.rglob("*.py"))
PLUMBING = ["arch", "calibrate", "stream", "gradients", "checkpoint", "source", "stats", "fused", "text"]

HEAVY = {"torch", "transformers", "datasets", "lm_eval", "huggingface_hub", "compressed_tensors", "matplotlib", "numpy"}
LOAD_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUN_CODE = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
RISKS = {"trust_remote_code", "shell", "allow_pickle"}


def layer_name(path: Path) -> str:
    """The module, or the folder that it is in: "grid", "methods"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Names of our modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            package = node.module == "llmcompress"
            names = [f"{node.module}.{alias.name}" if package else str(node.module) for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top, _, rest = name.partition(".")
            if top == "llmcompress" and rest and rest != "__version__":
                yield rest.split(".")[0]


@functools.cache
def reached(module: str) -> frozenset[str]:
    """Our modules that importing and using `module` can load, itself included."""
    found, new = {module}, [module]
    while new:
        name = new.pop()
        files = [path for path in FILES if layer_name(path) == name]
        fresh = {other for path in files for other in imported_modules(path)} - found
        found |= fresh
        new += fresh
    return frozenset(found)


def run_python(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stderr


# direction of imports


def test_every_module_has_one_layer():
    names = [name for layer in LAYERS for name in layer.split()]
    assert len(names) == len(set(names))
    assert set(names) == {layer_name(path) for path in FILES} - {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    if layer_name(path) == "__init__":
        assert not list(imported_modules(path))
        return
    rank = RANK[layer_name(path)]
    above = {other: RANK[other] for other in imported_modules(path) if RANK[other] > rank}
    assert not above, f"{path.name} is in layer {rank}"


@pytest.mark.parametrize("module", PLUMBING)
def test_plumbing_knows_no_method_or_format(module):
    assert not {"methods", "formats"} & reached(module)


def test_methods_and_formats_know_no_model_and_no_files():
    pure = {"methods", "errors", "options", "lazy", "shelf", "grid", "mask", "stats", "weight"}
    assert reached("methods") == pure
    assert reached("formats") == {"formats", "errors", "lazy", "grid", "mask", "stats", "weight"}


@pytest.mark.parametrize("module", ["reload", "modeling_llmcompress"])
def test_what_runs_elsewhere_uses_nothing_of_ours(module):
    assert reached(module) == {module}


def test_import_finder_sees_what_it_should(tmp_path):
    """The tests above can fail."""
    path = tmp_path / "x.py"
    path.write_text(
        "import llmcompress\nimport llmcompress.arch\nfrom llmcompress import __version__, grid\n"
        "def f():\n    from llmcompress.methods.gptq import GPTQ\n"
    )
    assert sorted(imported_modules(path)) == ["arch", "grid", "methods"]


# weight of an import


def test_importing_the_package_imports_nothing():
    code = "import sys; old = set(sys.modules); import llmcompress; print(*set(sys.modules) - old, file=sys.stderr)"
    found = run_python(code)
    assert found.split() == ["llmcompress"]


HELP = """
import runpy, sys
sys.argv = ["llmcompress", "--help"]
try:
    runpy.run_module("llmcompress", run_name="__main__")
except SystemExit as end:
    print(end.code or 0, *sys.modules, file=sys.stderr)
"""


def test_help_loads_no_heavy_library():
    code, *modules = run_python(HELP).split()
    assert code == "0"
    assert "llmcompress.cli" in modules
    assert not HEAVY & set(modules)


def test_help_is_quick():
    """Half a second; on a busy machine, twice what the libraries of a command line alone take there."""

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True, timeout=60)
        return time.perf_counter() - start

    unavoidable = median(seconds("-c", "import typer, rich.console, pydantic, yaml") for _ in range(3))
    assert median(seconds("-m", "llmcompress", "--help") for _ in range(3)) < max(0.5, 2 * unavoidable)


PLANS = """
import contextlib, io, sys
from llmcompress.cli import main
model, *recipes = sys.argv[1:]
for recipe in recipes:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(["plan", recipe, "--set", f"model={model}"])
    except SystemExit as end:
        print(end.code or 0, *sys.modules, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def modules_of_plans(tmp_path_factory, tiny_folders) -> dict[str, list[str]]:
    """Exit code and loaded modules after the plan of each method, one after the other in one interpreter."""
    folder, data = tmp_path_factory.mktemp("plans"), {"data": "t.txt", "length": 64}
    for name, method in METHODS.items():
        step = {"method": name} | ({"sparsity": 0.5} if issubclass(method, Pruner) else {"group_size": 32})
        recipe = {"model": "x", "device": "cpu", "calibration": data, "steps": [step]}
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))
    recipes = [str(folder / f"{name}.yaml") for name in METHODS]
    lines = run_python(PLANS, str(tiny_folders("llama")), *recipes).splitlines()
    return dict(zip(METHODS, map(str.split, lines), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_of_methods_needs_no_torch(method, modules_of_plans):
    """Whose import alone takes longer than a plan; of several methods that fail, the first one loads it."""
    code, *modules = modules_of_plans[method]
    assert code == "0"
    assert f"llmcompress.methods.{method}" in modules
    assert not {"torch", "transformers"} & set(modules)


# nothing that runs code from a checkpoint


def on(value: ast.expr | None) -> bool:
    """Whether a default or an argument is the literal True."""
    return isinstance(value, ast.Constant) and value.value is True


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Places where a file could run code that somebody else wrote."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            yield from (f"line {line}: imports {name}" for name in modules if name.split(".")[0] in LOAD_CODE)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in RUN_CODE:
                yield f"line {line}: calls {called}"
        if isinstance(node, ast.keyword) and node.arg in RISKS and on(node.value):
            yield f"line {node.value.lineno}: {node.arg}=True"
        if isinstance(node, ast.arguments):
            defaults = [
                *zip(reversed(node.posonlyargs + node.args), reversed(node.defaults), strict=False),
                *zip(node.kwonlyargs, node.kw_defaults, strict=True),
            ]
            for argument, default in defaults:
                if argument.arg == "trust_remote_code" and on(default):
                    yield f"line {argument.lineno}: trust_remote_code is on by default"
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code" and on(node.value):
            yield f"line {line}: trust_remote_code is on by default"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_sources_run_no_foreign_code(path):
    assert list(unsafe(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "def f():\n    import pickle.x",
        "eval('1')",
        "exec(x)",
        "torch.load('x')",
        "yaml.load(x)",
        "load(f, trust_remote_code=True)",
        "def f(trust_remote_code=True): pass",
        "def f(a, *, b, trust_remote_code: bool = True): pass",
        "class A:\n    trust_remote_code: bool = True",
        "run(x, shell=True)",
    ],
)
def test_unsafe_code_is_seen(source):
    assert len(list(unsafe(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('x')",
        "yaml.safe_load(x)",
        "load(f, trust_remote_code=trust)",
        "def f(*, trust_remote_code: bool = False): pass",
        "class A:\n    trust_remote_code: bool = False",
    ],
)
def test_safe_code_is_not_reported(source):
    assert not list(unsafe(ast.parse(source)))
