"""One form out of many: files, folders, benchmarks; and errors that name the file, the line and the column."""

import json
from pathlib import Path

import pytest

from mpunlearn.errors import DataError
from mpunlearn.lm.records import REFUSALS, Record, read_records, records_digest, with_alternates
from mpunlearn.lm.sources import Data

ROWS = [{"question": "q?", "answer": "a, b"}, {"question": "Größe?", "answer": 'say "x"\nand y'}]
RECORDS = [Record(row["question"], row["answer"]) for row in ROWS]


def lines(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_every_file_format_gives_the_same_records(tmp_path: Path) -> None:
    import csv

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


def test_questions_prompts_chats_and_texts_are_recognised(tmp_path: Path) -> None:
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
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"question": "q"}', "line 2: has the columns question; expected one of: question and answer"),
        ('{"question": "q", "answer": 3}', "line 2, column answer: expected text, found 3"),
        ('{"question": "q", "answer": "a", "alternate": [3]}', "line 2, column alternate: expected text, found 3"),
        ('{"text": "  "}', "line 2, column text"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "line 2, column messages"),
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

    refused(lines(tmp_path / "x.jsonl", ""), "holds no examples")
    refused(tmp_path / "missing.jsonl", "cannot be read")
    refused("just some words", "no such file or folder")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "binary.jsonl", "cannot be read")
    refused(lines(tmp_path / "y.csv", "question,answer", "q,a,b"), "y.csv, line 2: expected 2 columns")
    refused(lines(tmp_path / "z.csv", "question,answer", '"q,a'), "z.csv, line")
    refused(lines(tmp_path / "p.parquet", "no"), "cannot be read as parquet")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "not a folder that `datasets` saved")
    refused(lines(tmp_path / "k.jsonl", '{"a": "b"}'), "line 1: has no column 'c', only a", Data(text_key="c"))
    refused(lines(tmp_path / "array.json", "[{"), "not JSON")


def test_benchmarks_are_found_by_name_in_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "tofu").mkdir()
    (tmp_path / "muse" / "news").mkdir(parents=True)
    lines(tmp_path / "tofu" / "forget10.json", *ROWS)
    lines(tmp_path / "retain90.jsonl", *ROWS[:1])
    for part in ("forget", "retain1", "retain2"):
        (tmp_path / "muse" / "news" / f"{part}.txt").write_text(part, encoding="utf-8")
    data = Data(data_root=str(tmp_path))
    assert read_records("tofu/forget10", data) == RECORDS
    assert read_records("tofu/retain90", data) == RECORDS[:1]
    assert read_records("muse/news", data, "forget") == [Record(None, "forget")]
    assert read_records("muse/news", data, "retain") == [Record(None, "retain1")]
    assert read_records("muse/news/retain2", data) == [Record(None, "retain2")]
    with pytest.raises(DataError, match="tofu/forget99: not below --data-root"):
        read_records("tofu/forget99", data)
    with pytest.raises(DataError, match="name a part of the benchmark"):
        read_records("tofu", data)


def test_a_mirrored_repository_of_the_hub_is_loaded_as_one(tmp_path: Path) -> None:
    (tmp_path / "someone" / "things").mkdir(parents=True)
    lines(tmp_path / "someone" / "things" / "train.jsonl", *ROWS)
    assert read_records("someone/things", Data(data_root=str(tmp_path))) == RECORDS


def test_the_real_benchmark_loads_by_name() -> None:
    root = Path(__file__).parents[3] / "shared" / "data"
    if not root.is_dir():
        pytest.skip("TOFU is not beside the checkout")
    records = read_records("tofu/forget10", Data(data_root=str(root)))
    assert len(records) == 400
    assert all(record.question and record.answer for record in records)
    perturbed = Data(data_root=str(root), alternate_key="perturbed_answer")
    assert {len(record.alternates) for record in read_records("tofu/forget10_perturbed", perturbed)} == {5}


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
    with pytest.raises(DataError, match="holds no refusals"):
        with_alternates(mixed, Data(alternates=str(lines(tmp_path / "empty.txt", ""))), refusals=True, seed=1)


def test_the_digest_is_of_the_examples_not_of_where_they_stood() -> None:
    assert records_digest(RECORDS) == records_digest([Record(r.question, r.answer, where="x") for r in RECORDS])
    assert records_digest(RECORDS) != records_digest(RECORDS[::-1])
    assert records_digest([Record("a", "b")]) != records_digest([Record("a", "b", alternates=("c",))])
