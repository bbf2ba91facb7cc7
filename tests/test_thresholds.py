"""The file of activation thresholds comes from others until it is checked."""

import json

import pytest

from llmcompress.errors import FormatError
from llmcompress.thresholds import FILE, LARGEST_FILE, Threshold, Thresholds, thresholds_of, write_thresholds

ONE = {"threshold": 0.25, "sparsity": 0.4, "in_features": 96}
GOOD = {"version": 1, "method": "teal", "sparsity": 0.4, "dense_tokens": 4, "modules": {"model.layers.0.x": ONE}}


def test_what_is_written_is_read(tmp_path):
    written = Thresholds(0.4, 16, {"a.b": Threshold(0.0703125, 0.41, 576), "c": Threshold(0.0, 1.0, 3)})
    write_thresholds(tmp_path, written)
    assert thresholds_of(tmp_path) == written
    assert json.loads((tmp_path / FILE).read_text())["modules"]["a.b"]["threshold"] == 0.0703125


def test_a_folder_without_the_file_has_none(tmp_path):
    assert thresholds_of(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is not known"),
        ({"version": True}, "version True is not known"),
        ({"method": "cats"}, "method 'teal'"),
        ({"more": 1}, "expected the keys"),
        ({"modules": [1]}, "modules is list"),
        ({"modules": {"x": 0.25}}, "x: expected an object"),
        ({"modules": {"x": ONE | {"more": 1}}}, "x: expected an object"),
        ({"modules": {"x": ONE | {"threshold": -0.1}}}, "x.threshold is -0.1"),
        ({"modules": {"x": ONE | {"threshold": "0.1"}}}, "x.threshold is '0.1'"),
        ({"modules": {"x": ONE | {"threshold": True}}}, "x.threshold is True"),
        ({"modules": {"x": ONE | {"threshold": float("nan")}}}, "x.threshold is nan"),
        ({"modules": {"x": ONE | {"threshold": float("inf")}}}, "x.threshold is inf"),
        ({"modules": {"x": ONE | {"threshold": 10**400}}}, "x.threshold"),
        ({"modules": {"x": ONE | {"sparsity": 1.5}}}, "x.sparsity is 1.5"),
        ({"modules": {"x": ONE | {"in_features": 0}}}, "x.in_features is 0"),
        ({"modules": {"x": ONE | {"in_features": 96.0}}}, "x.in_features is 96.0"),
        ({"sparsity": 1}, "sparsity is 1"),
        ({"dense_tokens": -1}, "dense_tokens is -1"),
        ({"dense_tokens": 2**40}, "dense_tokens is"),
    ],
    ids=str,
)
def test_what_no_writer_makes_is_refused(change, message, tmp_path):
    (tmp_path / FILE).write_text(json.dumps(GOOD | change))
    with pytest.raises(FormatError, match=f"{FILE}: .*{message}"):
        thresholds_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        (json.dumps(GOOD)[:-1] + ', "version": 1}', "a key appears twice"),
        ('{"version": 1}', "expected the keys"),
        ("\udcff", "cannot be read as JSON"),
    ],
    ids=["empty", "list", "deep", "twice", "short", "bytes"],
)
def test_damaged_files_are_refused(text, message, tmp_path):
    (tmp_path / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=message):
        thresholds_of(tmp_path)


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(FormatError, match="more than any model needs"):
        thresholds_of(tmp_path)
