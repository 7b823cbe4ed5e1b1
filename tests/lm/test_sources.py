"""Where examples come from: benchmarks by name, mirrors, the Hugging Face Hub; and the options that name them."""

import ast
import dataclasses
import gzip
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.lm.rows import RECORDS, ROWS, lines

from mpunlearn.errors import DataError, PlanError
from mpunlearn.lm import sources
from mpunlearn.lm.records import Record, read_records
from mpunlearn.lm.sources import Data


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
    (tmp_path / "tofu" / "forget05.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    assert read_records("tofu/forget05", data) == RECORDS[:1]
    with pytest.raises(DataError, match="tofu/forget99: no such file or folder, and no mirror of it in --data-root"):
        read_records("tofu/forget99", data)
    with pytest.raises(DataError, match="name a part of the benchmark"):
        read_records("tofu", data)


def test_a_mirrored_repository_of_the_hub_is_loaded_as_one(tmp_path: Path) -> None:
    (tmp_path / "someone" / "things").mkdir(parents=True)
    lines(tmp_path / "someone" / "things" / "train.jsonl", *ROWS)
    for name in ("someone/things", "hub:someone/things"):
        assert read_records(name, Data(data_root=str(tmp_path))) == RECORDS
    for name in ("someone/other", "hub:someone/other", "hub:someone/other:part"):
        with pytest.raises(DataError, match=f"{name}: no such .* no mirror of it in --data-root.*someone/other$"):
            read_records(name, Data(data_root=str(tmp_path)))


def test_a_mistyped_path_never_reaches_the_hub_but_a_hub_name_does(hub) -> None:
    errors = hub.errors(
        "data/patients", "data/patients:2024", "data/patients.jsonl", "patients", "hub:patients", "hub:"
    )
    assert hub.asked == []
    mistaken = "no such file or folder; for a dataset on the Hugging Face Hub, write hub:data/patients"
    assert errors == [
        f"data/patients: {mistaken}",
        f"data/patients:2024: {mistaken}:2024",
        "data/patients.jsonl: no such file",
        "patients: no such file or folder; give an existing one, a benchmark such as tofu/forget10, or hub:OWNER/NAME",
        "hub:patients: expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIG",
        "hub:: expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIG",
    ]
    repositories = {
        "hub:data/patients": "data/patients",
        "hub:data/patients:2024": "data/patients",
        "tofu/forget10": "locuslab/TOFU",
        "muse/news": "muse-bench/MUSE-News",
    }
    errors = hub.errors(*repositories)
    for (source, repository), error in zip(repositories.items(), errors, strict=True):
        assert error.startswith(f"{source}: cannot be loaded from {repository} (DatasetNotFoundError: ")
        assert any(repository in path for path in hub.asked)


def test_the_module_of_the_options_loads_nothing_heavy() -> None:
    heavy = ("numpy", "torch", "pyarrow", "datasets", "transformers", "accelerate", "safetensors", "tqdm")
    script = f"import sys, mpunlearn.lm.sources; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_options_of_the_wrong_type_are_named() -> None:
    with pytest.raises(PlanError, match="--data-root: expected a string, found 3"):
        Data(data_root=3)
    with pytest.raises(PlanError, match="--alternate-key: expected a string, found None"):
        Data(alternate_key=None)


def test_the_help_of_every_option_is_a_sentence() -> None:
    """The docstrings under the fields are what the command line prints."""
    [body] = [node.body for node in ast.parse(inspect.getsource(sources)).body if getattr(node, "name", "") == "Data"]
    helps = [line.value.value for line in body[1:] if isinstance(line, ast.Expr)]
    assert len(helps) == len(dataclasses.fields(Data))
    assert all(text[0].isupper() and text.endswith(".") for text in helps)


def test_the_real_benchmark_loads_by_name() -> None:
    root = Path(__file__).parents[3] / "shared" / "data"
    if not root.is_dir():
        pytest.skip("TOFU is not beside the checkout")
    records = read_records("tofu/forget10", Data(data_root=str(root)))
    assert len(records) == 400
    assert all(record.question and record.answer for record in records)
    perturbed = Data(data_root=str(root), alternate_key="perturbed_answer")
    assert {len(record.alternates) for record in read_records("tofu/forget10_perturbed", perturbed)} == {5}
