"""Reading data: files, saved datasets, benchmarks and datasets on the Hugging Face Hub, as rows of named columns.

`read_rows` turns any source into one dict per row, together with the location of the row. The code that calls it does
not need to know about formats, and its errors can name the file, the line and the column. A source is one of these,
tried in this order:

    a file       .jsonl, .json, .csv, .txt (also gzipped: .jsonl.gz, …) or .parquet; others are read as JSON lines
    a folder     that the `datasets` library wrote with `save_to_disk`
    a benchmark  by name, such as tofu/forget10 or wmdp/bio; `benchmarks` has all names
    a dataset    on the Hugging Face Hub, as hub:OWNER/NAME or hub:OWNER/NAME:CONFIG

Only the last two are ever downloaded, and nothing is downloaded if `Data.data_root` names a folder with local mirrors.
Python programs can also give the examples themselves: a list of texts or of dicts, or a `datasets.Dataset`. A path that
does not exist is an error and never leads to a request to the Hub, since even the path of a forget set can
be confidential.

The command line needs `Data` for its options, so this module imports nothing that is slow to load. The libraries for
parquet and for datasets are imported when they are first used.

Not covered: datasets too large for memory. Forget sets are small.
"""

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpunlearn.errors import DataError, PlanError
from mpunlearn.extras import needs
from mpunlearn.lm.benchmarks import Remote, Row, find
from mpunlearn.schema import check_options

Source = str | Path | Iterable[str | Mapping[str, Any]]
"""Where examples come from: a path or name, or the examples themselves (a list of texts or dicts, or a `Dataset`)."""
TemplateKwargs = Mapping[str, str | int | float | bool]
"""Values for a chat template, by name."""
_RESERVED = frozenset(
    "conversation messages chat_template tools documents add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs processor_kwargs".split()
)
"""Arguments of transformers' `apply_chat_template`, which are no values for the template."""
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".jsonl.gz", ".json.gz", ".csv.gz", ".txt.gz")
_CONTENT = {
    ".jsonl": "one JSON object per line",
    ".json": "an array of JSON objects, or one object per line",
    ".csv": "a header line with the names of the columns, and one line per example",
    ".txt": "some text",
}
"""The expected content of each kind of file, for error messages."""
_HUB = "hub:"
_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?")
_SAVED = ("dataset_info.json", "dataset_dict.json")
"""A folder written by `save_to_disk` has one of these files."""


GENERATE = "generate"
"""The value of `Data.alternates` that lets the model write the alternate answers."""


@dataclass(frozen=True)
class Data:
    """How examples are read. The server never sees these options.

    Raises:
        PlanError: a value has the wrong type.
    """

    question_key: str | None = None
    """Column with the questions or prompts (default: question or prompt)."""
    answer_key: str | None = None
    """Column with the answers or completions (default: answer or completion)."""
    text_key: str | None = None
    """Column with plain texts (default: text)."""
    alternate_key: str = "alternate"
    """Column with alternate answers to the forget questions, each a text or a list of texts; used by dpo, altpo and
    jensun."""
    alternates: str | None = None
    """File of refusals, one per line. One of them is chosen at random for each forget question without an alternate
    answer (default: a built-in list for dpo, "No idea" for jensun, none for altpo). Or generate: the model writes alternate
    answers itself before it is trained, as in AltPO."""
    split: str = "train"
    """Split to read from datasets that have several."""
    data_root: str | None = None
    """Folder with local mirrors of benchmarks and datasets, such as DATA_ROOT/tofu/forget10.json. If it is given,
    nothing is downloaded (default: benchmarks and datasets on the Hugging Face Hub are downloaded)."""
    system_prompt: str | None = None
    """System message before every question, except in a chat that has its own (default: none)."""
    template_kwargs: TemplateKwargs | None = None
    """A value for the chat template, such as date_string="10 Apr 2025". Can be given several times."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise PlanError("--system-prompt: expected text, found none; leave the option out for no system message")
        for name in self.template_kwargs or {}:
            if not name.isidentifier() or name in _RESERVED:
                raise PlanError(
                    f"--template-kwargs: expected the name of a value that chat templates read, such as date_string, "
                    f"found {name!r:.40}"
                )


def read_rows(source: Source, data: Data, role: str = "forget") -> Iterator[Row]:
    """The rows of a source, whatever their columns.

    Args:
        source: a file, a folder, a benchmark, a dataset on the Hub, or the rows themselves.
        data: which split to read, and where local mirrors are.
        role: "forget" or "retain": which part of a benchmark to read if the source does not say.

    Raises:
        DataError: the source cannot be found or read. Damage inside a file is reported when its rows are iterated over.
    """
    if not isinstance(source, str | os.PathLike):
        return _given(source, role)
    path, source = Path(source), os.fspath(source)
    try:
        if path.is_dir():
            return _saved(path, data.split)
        if path.exists():
            return _file(path)
    except OSError as error:
        raise DataError(f"{source:.200}: cannot be opened: {error.strerror}; expected a file or folder") from error
    match = _HUB_NAME.fullmatch(source.removeprefix(_HUB))
    on_hub = Remote(match["repository"], match["config"], data.split) if match else None
    if source.startswith(_HUB):
        if on_hub is None:
            raise DataError(f"{source}: expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
        return _remote(source, on_hub, data)
    if _suffix(path):
        raise DataError(f"{source}: no such file")
    if benchmark := find(source, role):
        return _remote(source, benchmark, data)
    if on_hub is None:
        raise DataError(
            f"{source}: no such file or folder; give an existing one, a benchmark such as tofu/forget10, or "
            "hub:OWNER/NAME"
        )
    if data.data_root is None:
        raise DataError(f"{source}: no such file or folder; for a dataset on the Hugging Face Hub, write hub:{source}")
    return _remote(source, on_hub, data)


def _given(source: Any, role: str) -> Iterator[Row]:
    """Rows that a Python program gives: texts or dicts in a list, or a `Dataset`. A text is a row with a column `text`."""
    datasets = sys.modules.get("datasets")
    if not isinstance(source, list | tuple) and not (
        datasets is not None and isinstance(source, datasets.Dataset | datasets.IterableDataset)
    ):
        raise DataError(
            f"the {role} examples: expected a path, a list of texts or dicts, or a datasets.Dataset, found an object of "
            f"type {type(source).__name__}"
        )
    return (
        (where, {"text": row} if isinstance(row, str) else _object(where, row))
        for where, row in _rows(f"the {role} examples", source)
    )


def _remote(source: str, remote: Remote, data: Data) -> Iterator[Row]:
    """Rows from a local mirror if `data_root` is given, otherwise from the Hub."""
    where = remote.repository
    if data.data_root is not None:
        root = Path(data.data_root)
        for mirror in remote.mirrors:
            for suffix in _SUFFIXES:
                if (file := root / f"{mirror}{suffix}").is_file():
                    return remote.convert(_file(file))
        where = str(root / remote.repository)
        if not Path(where).is_dir():
            files = [f"the file {root / mirror}.json (or .jsonl, .csv, …)" for mirror in remote.mirrors]
            raise DataError(
                f"{source}: no such file or folder, and no mirror of it in --data-root; expected "
                f"{', or '.join([*files, f'the folder {where}'])}"
            )
    needs("data", source)
    import datasets

    try:
        # A mirror is streamed: for a changed one, the library would find the old rows in its cache.
        table = datasets.load_dataset(where, remote.config, split=remote.split, streaming=data.data_root is not None)
    except Exception as error:  # errors of the library, the network and every file format
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(f"{source}: cannot be loaded from {where} ({reason}); {_remedy(where, str(error))}") from error
    return remote.convert(_rows(source, table))


def _remedy(repository: str, error: str) -> str:
    """What to do if a dataset cannot be loaded."""
    offline = "to work offline, put a mirror in a folder and give it as --data-root"
    if "gated" not in error.lower():
        return offline
    return (
        f"its owners ask for consent: accept their conditions at https://huggingface.co/datasets/{repository}, then run "
        f"`hf auth login` or set HF_TOKEN; {offline}"
    )


def _saved(path: Path, split: str) -> Iterator[Row]:
    """Rows of a folder that `datasets` wrote with `save_to_disk`."""
    if not any((path / name).is_file() for name in _SAVED):
        raise DataError(
            f"{path}: a folder without a saved dataset (no {' or '.join(_SAVED)}); expected a file, or a folder that "
            "`datasets` wrote with save_to_disk"
        )
    needs("data", str(path))
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # errors of the library and of pyarrow
        raise DataError(f"{path}: the saved dataset is damaged ({_first_line(error)}); save it again") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise DataError(f"{path}: has no split {split!r}; found {', '.join(table)}; choose one with --split")
        table = table[split]
    return _rows(str(path), table)


def _rows(source: str, table: Iterable[Any]) -> Iterator[Row]:
    """The rows of a table that a library reads, with its errors turned into `DataError`."""
    number = 0
    try:
        for number, row in enumerate(table, start=1):
            yield f"{source}, row {number}", row
    except Exception as error:  # for damaged data, pyarrow raises errors of many kinds
        raise DataError(f"{source}, row {number + 1}: damaged ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _suffix(path: Path) -> str:
    """The suffix in `_SUFFIXES` that a file's name ends with, or an empty string."""
    return next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), "")


def _file(path: Path) -> Iterator[Row]:
    """Rows of a file. The format follows from the file's name."""
    kind = _suffix(path).removesuffix(".gz")
    if kind == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: is empty; expected {_CONTENT.get(kind, _CONTENT['.jsonl'])}")
    if kind == ".csv":
        return _csv(path, text)
    if kind == ".txt":
        return iter([(str(path), {"text": text})])
    if kind == ".json" and text.lstrip().startswith("["):
        return _array(path, text)
    return _lines(path, text)


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file, with or without a byte-order mark; decompressed if the name ends in .gz.

    Raises:
        DataError: the file is missing, cannot be read, or is not UTF-8 text.
    """
    wanted = "expected UTF-8 text (names of gzipped files must end in .gz, names of parquet files in .parquet)"
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text: str = file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a valid gzip file ({error}); compress it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path}: not UTF-8 text, since it contains the byte 0x{byte:02x}; {wanted}") from error
    if "\0" in text:
        raise DataError(f"{path}: not text, since it contains zero bytes; {wanted}")
    return text


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(where, _json(where, line, _CONTENT[".jsonl"]))


def _array(path: Path, text: str) -> Iterator[Row]:
    for number, value in enumerate(_json(str(path), text, _CONTENT[".json"]), start=1):
        where = f"{path}, entry {number}"
        yield where, _object(where, value)


def _json(where: str, text: str, expected: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # fails for a lone surrogate, which no tokenizer accepts
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be read as JSON ({error}); expected {expected}") from None
    return value


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object such as {{"question": …, "answer": …}}, found {value!r:.60}')
    return value


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: expected {len(reader.fieldnames or [])} columns as in the first line")
            yield where, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: cannot be read as CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Row]:
    needs("data", str(path))
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # for a damaged file, pyarrow raises errors of many kinds
        raise DataError(f"{path}: cannot be read as parquet ({_first_line(error)}); write the file again") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
