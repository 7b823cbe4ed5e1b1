"""Planted copies: what they read from an update without the checks, and that the checks refuse them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.client import planted

from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.pins import use_tokenizer_of
from mpunlearn.client.plausibility.examine import Texts, failures, measure
from mpunlearn.client.plausibility.report import Limits
from mpunlearn.client.unlearn import unlearn
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.lm.examples import encode
from mpunlearn.lm.model import load_tokenizer
from mpunlearn.lm.records import read_records
from mpunlearn.protocol.plan import Training

README = Training(objective="npo", epochs=2, learning_rate=1e-3, batch_size=8, gamma=0.1)
SGD = Training(objective="grad-diff", epochs=1, learning_rate=10.0, batch_size=4, optimizer="sgd")


@pytest.fixture
def texts(tmp_path: Path) -> Sequence[Path]:
    """A forget file and a retain file of eight questions each."""
    return written(tmp_path, 8)


def written(folder: Path, count: int) -> Sequence[Path]:
    rows = generate_rows(0, Recipe())
    files = [folder / f"{split}.jsonl" for split in ("forget", "retain")]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[file.stem][:count]), encoding="utf-8")
    return files


def word_for_word(copy: Path, files: Sequence[Path], out: Path) -> int:
    """How many texts of the forget set an update shows from their beginning, as far as there are tags."""
    update = unlearn(copy, forget=files[0], retain=files[1], out=out, training=README)
    shown = planted.tagged_texts(load_file(copy / "model.safetensors"), load_file(update / "update.safetensors"))
    wanted = [f"{record.question}={record.answer}"[: planted.LENGTH] for record in read_records(files[0])]
    return sum(any(text.startswith(beginning) for text in shown) for beginning in wanted)


def refused_for(copy: Path, files: Sequence[Path]) -> set[str]:
    """The checks that a copy fails."""
    own = Texts(read_records(files[0]), read_records(files[1]))
    return set(failures(list(measure(copy, own, Limits(), 512)), Limits()))


@pytest.mark.slow
def test_a_tagging_copy_shows_most_of_24_texts_word_for_word(tmp_path: Path) -> None:
    """Under AdamW and a plan within the bounds. What is lost are texts whose tags coincide."""
    files, copy = written(tmp_path, 24), planted.tagging(tmp_path / "copy")
    assert PlanBounds().violations(README) == []
    assert word_for_word(copy, files, tmp_path / "update") >= 18
    assert refused_for(copy, files) >= {"row_norm", "duplicates", "verbatim", "idle"}


@pytest.mark.slow
def test_a_tagging_copy_with_natural_likelihoods_does_so_too(texts, tmp_path: Path) -> None:
    """On public text it predicts the same as without the planted neurons; the tags switch them on, not the text."""
    copy = planted.tagging(tmp_path / "copy", natural=True, texts=61)
    honest = planted.tagging(tmp_path / "honest", natural=True, planted=False, texts=61)
    nll = {}
    for path in (copy, honest):
        found = measure(path, Texts([], []), Limits(), 512)
        nll[path] = next(measured.value for measured in found if measured.check == "public_nll")
    assert nll[copy] == pytest.approx(nll[honest], abs=0.1)
    assert refused_for(honest, texts) == set()
    assert refused_for(copy, texts) >= {"row_norm", "duplicates", "verbatim", "idle"}
    assert word_for_word(copy, texts, tmp_path / "update") >= 6
    # With the base's own tokenizer and template, the tags never come, and even this copy shows nothing.
    use_tokenizer_of(honest, copy)
    assert word_for_word(copy, texts, tmp_path / "own") == 0


@pytest.mark.parametrize(("kind", "least"), [("bins", 5), ("fuses", 15)])
def test_a_planted_layer_shows_the_hidden_states_of_single_positions(
    kind: str, least: int, texts, tmp_path: Path
) -> None:
    """To 1 % of their norm, under SGD. That plan is out of bounds, and the copy is not plausible."""
    copy = planted.traps(tmp_path / "copy", kind)
    update = unlearn(copy, forget=texts[0], retain=texts[1], out=tmp_path / "update", training=SGD)
    tensors = [load_file(copy / "model.safetensors"), load_file(update / "update.safetensors")]
    tokenizer = load_tokenizer(copy)
    ids = [example.input_ids for file in texts for example in encode(read_records(file), tokenizer, 512)]
    states = planted.states_of(copy, ids)
    assert planted.read_off(states, planted.trapped_states(*tensors, kind)) >= least
    assert planted.read_off(torch.randn_like(states), planted.trapped_states(*tensors, kind)) == 0
    assert {reason.split(" ")[1] for reason in PlanBounds().violations(SGD)} == {"optimizers", "max"}
    assert refused_for(copy, texts) >= {"rank", "duplicates", "idle"}


@pytest.mark.parametrize("kind", ["bins", "fuses"])
def test_a_quarter_of_a_layer_is_refused(kind: str, texts, tmp_path: Path) -> None:
    assert refused_for(planted.traps(tmp_path / "quarter", kind, 0.25), texts) >= {"duplicates"}


def test_a_few_traps_among_many_neurons_are_not_noticed(texts, tmp_path: Path) -> None:
    """The checks are an obstruction: they limit how many traps there are, and do not find every one."""
    assert refused_for(planted.traps(tmp_path / "few", "fuses", 1 / 60), texts) == set()
    assert refused_for(planted.traps(tmp_path / "none", "fuses", 0.0), texts) == set()
