"""The command line: exit codes, what goes to stdout and what to stderr, options."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import proof_inside, values, write_text

import llmcompress
from llmcompress.cli import main

RTN = {"method": "rtn", "group_size": 32}
Result = tuple[int, str, str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Exit code, stdout and stderr of a command, in this process."""

    def get(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return int(stop.value.code or 0), *capsys.readouterr()

    return get


@pytest.fixture(scope="module")
def recipe(tiny_folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-free recipe for the tiny Llama."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "w4.yaml"
    path.write_text(yaml.safe_dump(values(tiny_folders("llama"), write_text(folder / "text.txt"), RTN)))
    return path


# a finished folder


def test_inspect_shows_every_tensor(packed_folders, call):
    folder = packed_folders("llama")
    code, out, err = call("inspect", folder, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["format"] == "pack-quantized"
    assert sum(row["bytes"] for row in found["tensors"]) == found["bytes"]
    code, table, _ = call("inspect", folder)
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in table
    assert "vLLM: yes" in table


def test_push_dry_run_lists_every_file_and_sends_nothing(packed_folders, call):
    folder = packed_folders("llama")
    code, out, err = call("push", folder, "me/model", "--dry-run", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["url"] is None
    assert {row["path"] for row in printed["files"]} == {path.name for path in folder.iterdir()}
    assert "would go to me/model" in call("push", folder, "me/model", "--dry-run")[1]


def test_table_of_a_run_ends_with_the_folder(recipe, tmp_path, call, monkeypatch):
    with proof_inside(monkeypatch):
        code, out, _ = call("run", recipe, "--output", tmp_path / "out", "--set", "steps.0.bits=8")
    assert code == 0
    assert out.splitlines()[-1] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["layers"][0]["bits"] == 8


# plan


def test_plan_prints_one_json_object(recipe, call):
    code, out, err = call("plan", recipe, "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["format"] == "pack-quantized"
    assert len(printed["linears"]) == 14


def test_plan_shows_tables(recipe, call):
    code, out, err = call("plan", recipe)
    assert (code, err) == (0, "")
    for words in ("self_attn.q_proj", "rtn 4-bit group 32 symmetric", "model.embed_tokens", "peak host memory", "disk"):
        assert words in out


def test_plan_of_what_does_not_fit_is_refused(recipe, call):
    code, out, err = call("plan", recipe, "--set", "steps.0.group_size=64")
    assert (code, out) == (2, "")
    assert err.startswith("error: model.layers.0.")


@pytest.mark.parametrize(
    ("setting", "place", "expected"),
    [
        ("steps.0.bits=8", lambda plan: plan["linears"][0]["methods"], ["rtn"]),
        ("output.format=dense", lambda plan: plan["format"], "dense"),
        ("output={format: dense}", lambda plan: plan["format"], "dense"),
        ('keep=["lm_head", "*.down_proj"]', lambda plan: sorted(plan["kept"])[-1], "model.layers.1.mlp.down_proj"),
        (
            "steps.0.targets=['*.mlp.*']",
            lambda plan: plan["kept"]["model.layers.0.self_attn.q_proj"],
            "no step targets it",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else None,
)
def test_set_changes_nested_values(setting, place, expected, recipe, call):
    code, out, err = call("plan", recipe, "--set", setting, "--json")
    assert code == 0, err
    assert place(json.loads(out)) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "--set steps: expected KEY=VALUE"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("steps.7.bits=3", "'7' is not an item of a list of 1"),
        ("steps.x.bits=3", "'x' is not an item of a list of 1"),
        ("model.name=3", "'model' holds"),
        ("keep=[a", "'[a' is not a YAML value"),
        ("steps.0.bitz=3", "steps[0].bitz: unknown option; did you mean 'bits'"),
    ],
)
def test_set_that_cannot_be_done(setting, message, recipe, call):
    code, out, err = call("plan", recipe, "--set", setting)
    assert (code, out) == (2, "")
    assert message in err


def test_model_option_replaces_the_recipes_model(recipe, tiny_folders, call):
    code, out, _ = call("plan", recipe, "--model", tiny_folders("opt"), "--json")
    assert code == 0
    assert json.loads(out)["model"] == str(tiny_folders("opt"))


# lists, help, usage


@pytest.mark.parametrize("what", ["models", "datasets", "methods", "formats", "recipes", "suites"])
def test_list(what, call):
    code, out, err = call("list", what, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert all(row["name"] and row["description"] for row in rows)
    code, table, _ = call("list", what)
    assert code == 0
    assert all(row["name"] in table for row in rows)


def test_listed_recipe_can_be_planned_by_name(call):
    name = json.loads(call("list", "recipes", "--json")[1])[0]["name"]
    code, _, err = call("plan", name, "--set", "steps.0.bitz=3")
    assert code == 2
    assert "steps[0].bitz" in err


def test_version(call):
    assert call("--version") == (0, f"{llmcompress.__version__}\n", "")


@pytest.mark.parametrize(
    "command", [(), ("run",), ("plan",), ("eval",), ("inspect",), ("push",), ("list",)], ids=" ".join
)
def test_help(command, call):
    code, out, err = call(*command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: llmcompress" in out


@pytest.mark.parametrize(
    "arguments",
    [("walk",), ("run",), ("run", "a.yaml", "--nope"), ("list", "everything"), ("eval", "m", "--length", "1")],
    ids=" ".join,
)
def test_wrong_usage(arguments, call):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_inspect_of_what_is_no_checkpoint(folder, tmp_path, call):
    (tmp_path / "empty").mkdir()
    code, out, err = call("inspect", tmp_path / folder)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / folder}")


HEAVY = ("torch", "transformers", "datasets", "lm_eval", "huggingface_hub", "matplotlib", "compressed_tensors")


@pytest.mark.parametrize(
    ("code", "absent"),
    [("import llmcompress", HEAVY), ("from llmcompress.cli import main; main(['--help'])", HEAVY)],
    ids=["import", "help"],
)
def test_nothing_heavy_is_imported(code, absent):
    script = f"import sys\ntry:\n {code}\nexcept SystemExit: pass\nprint([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_our_own_bug_shows_its_traceback(recipe, monkeypatch):
    """Only what the user can mend is said in one message; anything else must not be hidden."""
    from llmcompress import stages

    def broken(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(stages, "plan_stages", broken)
    with pytest.raises(ZeroDivisionError):
        main(["plan", str(recipe)])
