"""One form out of many: files and folders of every format; and errors that name the file, the line and the column."""

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.lm.rows import RECORDS, ROWS, lines

from mpunlearn.errors import DataError, PlanError
from mpunlearn.lm.records import REFUSALS, Record, read_records, records_digest, with_alternates
from mpunlearn.lm.sources import Data

EXPECTED = {
    "e.jsonl": "one JSON object per line",
    "e.json": "an array of JSON objects, or one object per line",
    "e.csv": "a header line with the names of the columns, and one line per example",
    "e.txt": "some text",
    "e": "one JSON object per line",
}


def test_every_file_format_gives_the_same_records(tmp_path: Path) -> None:
    import datasets

    lines(tmp_path / "a.jsonl", *ROWS)
    lines(tmp_path / "b.json", *ROWS)
    lines(tmp_path / "c.json", json.dumps(ROWS, indent=1))
    with open(tmp_path / "d.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "e.parquet")
    table.save_to_disk(str(tmp_path / "f"))
    datasets.DatasetDict({"train": table, "other": table.select([0])}).save_to_disk(str(tmp_path / "g"))
    for name in ("a.jsonl", "b.json", "c.json", "d.csv", "e.parquet", "f", "g"):
        assert read_records(tmp_path / name) == RECORDS, name
    assert read_records(tmp_path / "g", Data(split="other")) == RECORDS[:1]
    with pytest.raises(DataError, match=r"no split 'third'; found train, other"):
        read_records(tmp_path / "g", Data(split="third"))


def test_questions_prompts_chats_and_texts_are_recognized(tmp_path: Path) -> None:
    user, system = {"role": "user", "content": "q"}, {"role": "system", "content": "be kind"}
    assistant = {"role": "assistant", "content": "a"}
    path = lines(
        tmp_path / "x.jsonl",
        {"question": "q", "answer": "a", "perturbed_answer": ["b"]},
        "",
        {"prompt": "q", "completion": "a"},
        {"messages": [system, user, assistant]},
        {"prompt": [system, user], "completion": [assistant]},
        {"prompt": [user], "completion": "a"},
        {"text": "once"},
    )
    plain, chat = Record("q", "a"), Record("q", "a", (("system", "be kind"),))
    assert read_records(path) == [plain, plain, chat, chat, plain, Record(None, "once")]
    (tmp_path / "book.txt").write_text("once\nupon a time", encoding="utf-8")
    assert read_records(tmp_path / "book.txt") == [Record(None, "once\nupon a time")]


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {"Q": "q", "A": "a", "text": "t", "wrong": ["b", "c"], "idk": "d"})
    assert read_records(path, Data(question_key="Q", answer_key="A")) == [Record("q", "a")]
    assert read_records(path, Data(text_key="text")) == [Record(None, "t")]
    several = read_records(path, Data(question_key="Q", answer_key="A", alternate_key="wrong"))
    assert several == [Record("q", "a", alternates=("b", "c"))]
    one = read_records(path, Data(question_key="Q", answer_key="A", alternate_key="idk"))
    assert one == [Record("q", "a", alternates=("d",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: cannot be read as JSON .*expected one JSON object per line"),
        ("[]", "line 2: expected an object"),
        ('{"question": "q"}', "line 2: has the columns question; expected one of: question and answer"),
        ('{"question": "q", "answer": 3}', "line 2, column answer: expected text, found 3"),
        ('{"question": "q", "answer": "a", "alternate": [3]}', "line 2, column alternate: expected text, found 3"),
        ('{"question": "q", "answer": "a", "alternate": 3}', "line 2, column alternate: expected text, found 3"),
        ('{"question": "q", "answer": "a", "alternate": {"b": 1}}', "line 2, column alternate: expected text, found {"),
        ('{"text": "  "}', "line 2, column text"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "line 2, column messages: expected a list of messages"),
        ('{"messages": []}', "line 2, column messages: expected a list of messages"),
        ('{"messages": "q"}', "line 2, column messages: expected a list of messages"),
        ('{"prompt": [{"role": "user"}], "completion": "a"}', "line 2, column prompt and completion"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(lines(tmp_path / "x.jsonl", '{"text": "fine"}', line))


def test_bad_sources_are_named(tmp_path: Path) -> None:
    def refused(source, message: str, data: Data | None = None) -> None:
        with pytest.raises(DataError, match=message):
            read_records(source, data)

    for name, expected in EXPECTED.items():
        refused(lines(tmp_path / name, ""), f"{name}: is empty; expected {expected}")
        refused(lines(tmp_path / name, " ", "\t"), f"{name}: is empty")
    refused(lines(tmp_path / "none.json", "[]"), "none.json: contains no examples")
    refused(lines(tmp_path / "head.csv", "question,answer"), "head.csv: contains no examples")
    for name in ("missing.jsonl", "missing.txt.gz", "missing.parquet"):
        refused(tmp_path / name, f"{name}: no such file$")
        refused(name, f"^{name}: no such file$")
    refused(
        "just some words", "no such file or folder; give an existing one, a benchmark such as tofu/forget10, or hub:"
    )
    refused(str(tmp_path / "patients"), "no such file or folder; give an existing one")
    refused("x" * 5000, "File name too long")
    (tmp_path / "binary.jsonl").write_bytes(b'{"text": "\xff"}')
    refused(tmp_path / "binary.jsonl", "not UTF-8 text, since it contains the byte 0xff; expected UTF-8 text")
    (tmp_path / "zeros.txt").write_bytes("Größe".encode("utf-16-be").replace(b"\xf6", b"o").replace(b"\xdf", b"s"))
    refused(tmp_path / "zeros.txt", "not text, since it contains zero bytes; expected UTF-8 text")
    refused(lines(tmp_path / "y.csv", "question,answer", "q,a,b"), "y.csv, line 2: expected 2 columns")
    refused(lines(tmp_path / "z.csv", "question,answer", '"q,a'), "z.csv, line 2: cannot be read as CSV")
    (tmp_path / "folder").mkdir()
    refused(
        tmp_path / "folder", "a folder without a saved dataset .*expected a file, or a folder that `datasets` wrote"
    )
    refused(lines(tmp_path / "k.jsonl", '{"a": "b"}'), "line 1: has no column 'c', only a", Data(text_key="c"))
    refused(
        lines(tmp_path / "array.json", "[{"), "array.json: cannot be read as JSON .*expected an array of JSON objects"
    )
    refused(lines(tmp_path / "entry.json", '[{"text": "a"}, 3]'), "entry 2: expected an object")


@given(st.integers(1, 200_000), st.sampled_from(["[", '{"text": ', '{"text": [']))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_deeply_nested_json_is_an_error_of_the_data(tmp_path: Path, depth: int, opening: str) -> None:
    text = opening * depth + "1" + {"[": "]", "{": "}"}[opening[-1:].replace(" ", "{")] * depth
    for name in ("x.jsonl", "x.json"):
        with pytest.raises(DataError, match=name):
            read_records(lines(tmp_path / name, text))


def test_half_a_surrogate_pair_is_an_error_of_the_data(tmp_path: Path) -> None:
    assert read_records(lines(tmp_path / "x.jsonl", r'{"text": "\ud83d\ude00"}')) == [Record(None, "\N{GRINNING FACE}")]
    with pytest.raises(DataError, match="x.jsonl, line 1: cannot be read as JSON .*surrogates not allowed"):
        read_records(lines(tmp_path / "x.jsonl", r'{"text": "\ud83d"}'))


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_parquet_is_an_error_of_the_data(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes may change, and the end may be missing: the rows are read, or a `DataError` names the file."""
    import pyarrow

    file = tmp_path / "x.parquet"
    table = pyarrow.table({"question": ["Größe?", "q?"] * 20, "answer": ["a", "b"] * 20})
    pyarrow.parquet.write_table(table, file, compression=data.draw(st.sampled_from(["none", "snappy"])))
    content = bytearray(file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: len(content) - data.draw(st.integers(0, 3) | st.integers(0, len(content)))])
    try:
        read_records(file)
    except DataError as error:
        assert str(file) in str(error)  # noqa: PT017


def test_a_parquet_whose_text_is_not_unicode_is_an_error_of_the_data(tmp_path: Path) -> None:
    import pyarrow.parquet

    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["Montpellier"]}), file, compression="none", use_dictionary=False
    )
    content = file.read_bytes()
    assert read_records(file) == [Record(None, "Montpellier")]
    file.write_bytes(content.replace(b"Montpellier", b"Montpel\xff\xfeer"))
    with pytest.raises(DataError, match="x.parquet: cannot be read as parquet"):
        read_records(file)


def test_a_damaged_saved_data_set_is_an_error_of_the_data(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    (file,) = folder.glob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[:20])
    with pytest.raises(DataError, match="saved: the saved dataset is damaged .*save it again"):
        read_records(folder)
    assert content.count("Größe".encode()) == 1
    file.write_bytes(content.replace("Größe".encode(), b"\xff" * 7))
    with pytest.raises(DataError, match="saved, row 2: damaged"):
        read_records(folder)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.csv.gz", "x.txt.gz", "X.JSONL.GZ"])
def test_gzipped_files_are_read_and_damaged_ones_named(tmp_path: Path, name: str) -> None:
    text = {
        "jsonl": "\n".join(map(json.dumps, ROWS)),
        "json": json.dumps(ROWS),
        "csv": 'question,answer\nq?,"a, b"\nGröße?,"say ""x""\nand y"\n',
        "txt": "once\nupon a time",
    }[name.lower().split(".")[1]]
    plain, file = tmp_path / name.removesuffix(".gz").removesuffix(".GZ"), tmp_path / name
    plain.write_text(text, encoding="utf-8")
    content = gzip.compress(text.encode())
    file.write_bytes(content)
    assert read_records(file) == read_records(plain)
    damages = [content[:-9], content[: len(content) // 2], content[:12], text.encode(), content[:-8] + bytes(8)]
    for damaged in damages:
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}: not a valid gzip file"):
            read_records(file)
    file.write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=f"{name}: is empty"):
        read_records(file)


@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".txt", ""]),
    st.booleans(),
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), min_size=1),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_survive_every_text_format_with_and_without_a_byte_order_mark(
    tmp_path: Path, suffix: str, mark: bool, texts: list[str]
) -> None:
    buffer = io.StringIO()
    if suffix == ".csv":
        writer = csv.DictWriter(buffer, ["text"])
        writer.writeheader()
        writer.writerows({"text": text} for text in texts)
    elif suffix == ".json":
        json.dump([{"text": text} for text in texts], buffer, ensure_ascii=False)
    elif suffix == ".txt":
        texts = ["\n".join(texts)]
        buffer.write(texts[0])
    else:
        buffer.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    file = tmp_path / f"x{suffix}"
    file.write_bytes(buffer.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    expected = [Record(None, text.removeprefix("\ufeff") if suffix == ".txt" and not mark else text) for text in texts]
    assert read_records(file) == expected


def test_alternates_come_from_the_column_a_file_or_our_refusals(tmp_path: Path) -> None:
    mixed = [Record("q", "a", alternates=("b",)), *[Record(f"q{n}", "a") for n in range(40)]]
    own = with_alternates(mixed, Data(), refusals=True, seed=1)
    assert own[0].alternates == ("b",)
    assert {alternate for record in own[1:] for alternate in record.alternates} <= set(REFUSALS)
    assert len({record.alternates for record in own[1:]}) > 5
    assert own == with_alternates(mixed, Data(), refusals=True, seed=1)
    assert own != with_alternates(mixed, Data(), refusals=True, seed=2)
    file = lines(tmp_path / "no.txt", "never heard of it", "", " no idea ")
    drawn = with_alternates(mixed[1:], Data(alternates=str(file)), refusals=False, seed=1)
    assert {record.alternates for record in drawn} == {("never heard of it",), ("no idea",)}
    with pytest.raises(DataError, match="--alternate-key"):
        with_alternates(mixed, Data(), refusals=False, seed=1)
    with pytest.raises(DataError, match="expected a question"):
        with_alternates([Record(None, "text")], Data(), refusals=True, seed=1)
    with pytest.raises(DataError, match="contains no refusals"):
        with_alternates(mixed, Data(alternates=str(lines(tmp_path / "empty.txt", ""))), refusals=True, seed=1)


def test_the_digest_is_of_the_examples_not_of_where_they_stood() -> None:
    assert records_digest(RECORDS) == records_digest([Record(r.question, r.answer, where="x") for r in RECORDS])
    assert records_digest(RECORDS) != records_digest(RECORDS[::-1])
    assert records_digest([Record("a", "b")]) != records_digest([Record("a", "b", alternates=("c",))])


def test_the_owner_of_the_data_gives_the_system_prompt_and_the_values_of_the_template(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    own = [
        {"role": "system", "content": "Own."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in ({"question": "q", "answer": "a"}, {"messages": own})))
    plain = read_records(file)
    chats = read_records(
        file, Data(system_prompt="Be kind.", template_kwargs={"date_string": "10 Apr 2025", "b": False})
    )
    values = (("b", False), ("date_string", "10 Apr 2025"))
    assert [record.history for record in plain] == [(), (("system", "Own."),)]
    assert [record.history for record in chats] == [(("system", "Be kind."),), (("system", "Own."),)]
    assert [record.template for record in chats] == [values, values]
    # Data without these options keep the digest that runs of older versions pinned.
    before = [["q", "a", [], []], ["q", "a", [["system", "Own."]], []]]
    assert records_digest(plain) == hashlib.sha256(json.dumps(before).encode()).hexdigest()
    only = read_records(file, Data(template_kwargs={"b": False}))
    assert len({records_digest(records) for records in (plain, chats, only)}) == 3
    text = read_records([{"text": "A plain text."}], Data(system_prompt="Be kind."))
    assert text == [Record(None, "A plain text.")]


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "no name"])
def test_values_of_the_template_replace_nothing_else(name: str) -> None:
    with pytest.raises(PlanError, match=rf"--template-kwargs: expected the name of a value .*, found '{name}'"):
        Data(template_kwargs={name: "x"})
    with pytest.raises(PlanError, match="--system-prompt: expected text"):
        Data(system_prompt=" ")
