"""The benchmark of the client's audit: its texts and its tables."""

import json
from pathlib import Path

import client_audit
from mpunlearn.demo.world import Recipe, generate_rows


def test_the_texts_of_all_roles_are_different(tmp_path: Path) -> None:
    files = client_audit.write_texts(generate_rows(0, Recipe()), tmp_path / "texts")
    texts = {
        name: [json.loads(line)["question"] for line in file.read_text().splitlines()] for name, file in files.items()
    }
    assert {name: len(lines) for name, lines in texts.items()} == {
        "forget": 20, "near": 20, "retain": 180, "reference": 140, "decoys": 20,
    }  # fmt: skip
    everything = [line for lines in texts.values() for line in lines]
    assert len(set(everything)) == len(everything)


def test_a_table_has_a_column_for_every_value() -> None:
    seeds = [{"one": {"auc": 0.5}, "two": {"auc": 1.0, "tpr": 0.25}}, {"one": {"auc": 0.7}, "two": {"auc": 1.0}}]
    assert client_audit.table("way", seeds).splitlines() == [
        "| way | auc | tpr |",
        "|---|---|---|",
        "| one | 0.600 ± 0.141 |  |",
        "| two | 1.000 ± 0.000 | 0.250 |",
    ]
