"""Strict options: what is refused, and what the message names."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from llmcompress.errors import RecipeError
from llmcompress.methods import METHODS, IntMethod, Pruner
from llmcompress.options import Options, known_keys

QUANTIZERS = [name for name, cls in METHODS.items() if issubclass(cls, IntMethod)]


class Inner(Options):
    depth: int = 1


class Outer(Options):
    bits: Literal[2, 4] = 4
    damp: float = Field(0.01, gt=0)
    name: str = "x"
    inner: Inner | None = None
    many: list[Inner] = Field(default=[])

    @field_validator("name")
    @classmethod
    def _short(cls, value: str) -> str:
        if len(value) > 3:
            raise ValueError("Expected at most 3 letters")
        return value


REFUSED = {
    "unknown key, near": ({"bit": 2}, r"^steps\[0\]\.bit: unknown option; did you mean 'bits'\? \(known: bits, damp, "),
    "unknown key, far": ({"zzz": 2}, r"^steps\[0\]\.zzz: unknown option \(known: bits"),
    "unknown nested key": ({"inner": {"dept": 2}}, r"steps\[0\]\.inner\.dept: unknown option; did you mean 'depth'\?"),
    "unknown key in a list": ({"many": [{}, {"deep": 2}]}, r"steps\[0\]\.many\[1\]\.deep: .*\(known: depth\)"),
    "not among the choices": ({"bits": 5}, r"steps\[0\]\.bits: input should be 2 or 4 \(found 5\)"),
    "out of range": ({"damp": 0}, r"steps\[0\]\.damp: .*greater than 0 \(found 0\)"),
    "string for a number": ({"damp": "0.1"}, r"steps\[0\]\.damp: .*number \(found '0\.1'\)"),
    "number for a string": ({"name": 3}, r"steps\[0\]\.name: .*string \(found 3\)"),
    "float for an int": ({"inner": {"depth": 2.5}}, r"steps\[0\]\.inner\.depth: .*integer.*2\.5"),
    "whole float for an int": ({"inner": {"depth": 2.0}}, r"steps\[0\]\.inner\.depth: .*integer.*2\.0"),
    "bool for an int": ({"inner": {"depth": True}}, r"steps\[0\]\.inner\.depth: .*integer.*True"),
    "our own message": ({"name": "long"}, r"steps\[0\]\.name: expected at most 3 letters \(found 'long'\)"),
    "not a mapping": ([1], r"^steps\[0\]: expected a mapping of options, found \[1\]$"),
    "nothing": (None, r"^steps\[0\]: expected a mapping of options, found None$"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(values, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Outer.parse(values, "steps[0]")
    assert "\n" not in str(caught.value)


def test_required_option():
    class Needy(Options):
        data: str

    with pytest.raises(RecipeError, match=r"^calibration\.data: this option is required$"):
        Needy.parse({}, "calibration")


def test_first_problem_is_named_at_the_top_level():
    with pytest.raises(RecipeError, match=r"^bit: unknown option"):
        Outer.parse({"bit": 1}, "")


def test_int_may_stand_for_a_float():
    assert Outer.parse({"damp": 1}, "").damp == 1.0


def test_records_are_frozen_and_compare_by_value():
    one = Outer.parse({"bits": 2}, "")
    assert one == Outer(bits=2)
    with pytest.raises(ValidationError, match="frozen"):
        one.bits = 4


def test_known_keys_go_down_into_records():
    assert known_keys(Outer, ()) == {"bits", "damp", "name", "inner", "many"}
    assert known_keys(Outer, ("inner",)) == {"depth"}
    assert known_keys(Outer, ("many", 0)) == {"depth"}


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_their_defaults_and_refuse_a_typo(name):
    needed = {"sparsity": 0.5} if issubclass(METHODS[name], Pruner) else {}
    method = METHODS[name].parse(needed, "steps[0]")
    assert METHODS[name].parse(method.model_dump(), "steps[0]") == method
    option = "pattern" if needed else "group_size"
    with pytest.raises(RecipeError, match=rf"steps\[0\]\.{option}s: unknown option; did you mean '{option}'"):
        METHODS[name].parse(needed | {f"{option}s": 64}, "steps[0]")


@pytest.mark.parametrize("size", [0, 16, 63, "rows", 64.0, True], ids=repr)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_group_sizes_that_no_engine_has_are_refused(name, size):
    with pytest.raises(RecipeError, match=r"steps\[0\]\.group_size"):
        METHODS[name].parse({"group_size": size}, "steps[0]")


@pytest.mark.parametrize("size", [32, 64, 128, "row"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_group_size_sets_the_columns_per_scale(name, size):
    assert METHODS[name].parse({"group_size": size}, "").group(256) == (256 if size == "row" else size)
