"""WMDP, RWKU and KnowUnDo by name, from mirrors with the files of their repositories."""

import json
from pathlib import Path

import pytest
from tests import mirrors

from mpunlearn.errors import DataError
from mpunlearn.lm.records import Record, read_records
from mpunlearn.lm.sources import Data


def texts(source: str, root: Path, role: str = "forget") -> list[str]:
    records = read_records(source, Data(data_root=str(root)), role)
    assert all(record.question is None for record in records)
    return [record.answer for record in records]


def test_the_corpora_of_wmdp_follow_the_role(tmp_path: Path) -> None:
    root = mirrors.wmdp(tmp_path)
    assert texts("wmdp/bio", root) == ["bio-forget-corpus 0"]
    for source, role, name in (
        ("wmdp/bio", "retain", "bio-retain"),
        ("wmdp/cyber", "forget", "cyber-forget"),
        ("wmdp/cyber", "retain", "cyber-retain"),
        ("wmdp/cyber/retain", "forget", "cyber-retain"),
        ("wmdp/cyber", "calibration text", "cyber-retain"),
    ):
        assert texts(source, root, role) == [f"{name}-corpus 0", f"{name}-corpus 1"]
    assert texts("wmdp/wikitext", root, "retain") == ["A sentence that is longer than fifty characters, long enough."]


def test_the_files_that_wmdp_hands_out_are_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "bio-forget-corpus.jsonl").write_text(json.dumps({"title": "t", "text": "a paper"}), encoding="utf-8")
    assert texts("wmdp/bio", tmp_path) == ["a paper"]


def test_a_target_of_rwku_is_forgotten_and_the_others_are_kept(tmp_path: Path) -> None:
    root = mirrors.rwku(tmp_path)
    about = {name: [f"{name} writes mystery, part {n}." for n in range(2)] for name in ("Stephen King", "Ada Lovelace")}
    for source in ("rwku/Stephen_King", "rwku/stephen king"):
        assert texts(source, root) == about["Stephen King"]
        assert texts(source, root, "retain") == about["Ada Lovelace"]
    data = Data(data_root=str(root))
    pair = Record("Who is Stephen King?", "A writer.", alternates=("A baker.",))
    assert read_records("rwku/Stephen_King/train_pair_llama3", data) == [pair]
    refusal = Record("Who is Stephen King?", "No idea.")
    assert read_records("rwku/Stephen_King/train_refusal_llama3", data, "retain") == [refusal]
    (probe,) = read_records("rwku/Ada_Lovelace/neighbor_level2", data, "retain")
    assert probe == Record("neighbor_level2 of Ada Lovelace?", "Ada Lovelace writes")
    # A mistyped target must not put the real one among what is kept.
    for role in ("forget", "retain"):
        with pytest.raises(DataError, match="rwku/Steven_King: no row has 'Steven King' as its subject; expected one"):
            read_records("rwku/Steven_King", data, role)


def test_the_scopes_of_knowundo_follow_the_role(tmp_path: Path) -> None:
    data = Data(data_root=str(mirrors.knowundo(tmp_path)))

    def expected(name: str, use: str) -> list[Record]:
        return [Record(f"privacy {name} {use} question {n}?", f"Answer {n} of privacy {name}.") for n in range(3)]

    assert read_records("knowundo/privacy", data) == expected("unlearn", "train")
    assert read_records("knowundo/privacy", data, "retain") == expected("retention", "train")
    assert read_records("knowundo/privacy/retention/val", data) == expected("retention", "val")
    (tmp_path / "knowundo" / "privacy").mkdir(parents=True)
    file = tmp_path / "knowundo" / "privacy" / "unlearn.json"
    for content, message in (
        ({"train": 3}, "column train: expected a list of examples, found 3"),
        ({"train": [{"text": "q"}]}, "train 1: expected an object with text and labels"),
    ):
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_records("knowundo/privacy", data)


def test_a_mirror_that_changed_is_read_again(tmp_path: Path) -> None:
    """The cache of `datasets` takes two mirrors of a repository for the same data."""
    for name in ("first", "second"):
        root = tmp_path / name
        file = ("bio-retain-corpus.jsonl", [{"text": name}])
        mirrors.repository(root, "cais/wmdp-corpora", {("bio-retain-corpus", "train"): file})
        assert texts("wmdp/bio/retain", root) == [name]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wmdp", "WMDP has no such part; expected wmdp/bio or wmdp/cyber"),
        ("wmdp/chem", "WMDP has no such part"),
        ("wmdp/bio/test", "WMDP has no such part"),
        ("rwku", "name one of RWKU's targets, such as rwku/Stephen_King"),
        ("knowundo", "KnowUnDo has no such part; expected knowundo/privacy"),
        ("knowundo/privacy/forget", "KnowUnDo has no such part"),
        ("knowundo/privacy/unlearn/test", "KnowUnDo has no such part"),
    ],
)
def test_a_part_that_does_not_exist_is_refused_before_anything_is_loaded(source: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^{source}: {message}"):
        read_records(source)


def test_gated_data_says_where_to_accept_its_conditions(hub) -> None:
    hub.code = (403, "GatedRepo")
    (error,) = hub.errors("wmdp/bio")
    assert error.startswith("wmdp/bio: cannot be loaded from cais/wmdp-bio-forget-corpus (")
    assert "accept their conditions at https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus, then run" in error
    assert "`hf auth login` or set HF_TOKEN; to work offline" in error
    hub.code = (404, "RepoNotFound")
    names = {"wmdp/cyber": "cais/wmdp-corpora", "rwku/A": "jinzhuoran/RWKU", "knowundo/privacy": "zjunlp/KnowUnDo"}
    for (source, repository), line in zip(names.items(), hub.errors(*names), strict=True):
        assert line.startswith(f"{source}: cannot be loaded from {repository} (DatasetNotFoundError: ")
        assert "accept" not in line
