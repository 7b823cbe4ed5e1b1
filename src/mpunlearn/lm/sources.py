"""Where examples come from."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.errors import DataError

Row = tuple[str, dict[str, Any]]
"""Where a row stands, for errors, and the row."""
_BENCHMARKS = {
    "tofu": ("locuslab/TOFU", "{part}", "train"),
    "muse/news": ("muse-bench/MUSE-News", "{folder}", "{part}"),
    "muse/books": ("muse-bench/MUSE-Books", "{folder}", "{part}"),
}
"""Benchmark → its repository on the hub, configuration and split (TOFU: arXiv 2401.06121; MUSE: arXiv 2407.06460).

A part of MUSE may name the configuration: muse/news/knowmem/forget_qa; else it is one of the raw texts."""
_MUSE_PARTS = {"forget": "forget", "retain": "retain1"}
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Data:
    """How examples are read. Only the data owner knows this."""

    question_key: str | None = None
    """column of questions or prompts (default: question or prompt)"""
    answer_key: str | None = None
    """column of answers or completions (default: answer or completion)"""
    text_key: str | None = None
    """column of plain texts (default: text)"""
    alternate_key: str = "alternate"
    """column of alternate answers to forget questions, a text or a list of texts; used by dpo and altpo"""
    alternates: str | None = None
    """file of refusals, one a line, one of which is drawn for each forget question (default for dpo: our own list)"""
    split: str = "train"
    """split of data sets that have several"""
    data_root: str | None = None
    """folder with local mirrors of benchmarks and data sets, such as DATA_ROOT/tofu/forget10.json"""


def read_rows(source: str, data: Data, role: str = "forget") -> Iterator[Row]:
    """The rows of a source, whatever their columns, each with where it stands. Arguments and errors as for `read_records`."""
    path = Path(source)
    if path.is_dir():
        return _saved(path, data.split)
    if path.is_file() or path.suffix in _SUFFIXES:
        return _file(path)
    if benchmark := _benchmark(source, role):
        return _mirrored(source, *benchmark, data)
    if name := _HUB_NAME.fullmatch(source):
        return _mirrored(source, name["name"], name["config"], data.split, [], data)
    raise DataError(f"{source}: no such file or folder, and not the name of a benchmark or data set")


def _benchmark(source: str, role: str) -> tuple[str, str, str, list[str]] | None:
    """Repository, configuration, split and the places of a local mirror of a benchmark's part."""
    for name, (repository, config, split) in _BENCHMARKS.items():
        if source != name and not source.startswith(name + "/"):
            continue
        part = source[len(name) + 1 :] or (_MUSE_PARTS[role] if name.startswith("muse") else "")
        if not part:
            raise DataError(f"{source}: name a part of the benchmark, such as {name}/forget10")
        folder, _, last = part.rpartition("/")
        names = {"folder": folder or "raw", "part": last}
        return repository, config.format(**names), split.format(**names), [f"{name}/{part}", part]
    return None


def _mirrored(
    source: str, repository: str, config: str | None, split: str, places: list[str], data: Data
) -> Iterator[Row]:
    """Rows of a local mirror, or else of the hub."""
    root = Path(data.data_root) if data.data_root is not None else None
    if root is not None:
        for place in places:
            for suffix in _SUFFIXES:
                if (file := root / f"{place}{suffix}").is_file():
                    return _file(file)
        if not (root / repository).is_dir():
            tried = ", ".join(str(root / place) + ".json" for place in [*places, repository])
            raise DataError(f"{source}: not below --data-root {root}; looked for {tried} and the like")
    import datasets

    try:
        found = datasets.load_dataset(str(root / repository) if root else repository, config, split=split)
    except Exception as error:  # the library raises its own kinds, the network's, and the file formats'
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source}: cannot be loaded from {repository} ({type(error).__name__}: {reason}); without the hub, keep a "
            "mirror below --data-root"
        ) from error
    return ((f"{source}, row {number}", row) for number, row in enumerate(found, start=1))


def _saved(path: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: not a folder that `datasets` saved ({str(error).splitlines()[0]}); expected save_to_disk's"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path}: has no split {split!r}; found {', '.join(found)}, choose with --split")
        found = found[split]
    return ((f"{path}, row {number}", row) for number, row in enumerate(found, start=1))


def _file(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        return _parquet(path)
    text = _text(path)
    if path.suffix == ".csv":
        return _csv(path, text)
    if path.suffix == ".txt":
        return iter([(str(path), {"text": text})])
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _array(path, text)
    return _lines(path, text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); expected one JSON object per line") from None
        yield where, _object(where, value)


def _array(path: Path, text: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); expected an array of objects, or one object per line") from None
    for number, value in enumerate(values, start=1):
        yield f"{path}, entry {number}", _object(f"{path}, entry {number}", value)


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object such as {{"question": …, "answer": …}}, found {value!r:.60}')
    return value


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: expected {len(reader.fieldnames or [])} columns as in the first line")
            yield where, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
