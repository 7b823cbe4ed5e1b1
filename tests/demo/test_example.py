"""The example, as a new user tries it: `mpunlearn example try && cd try`."""

import json
from pathlib import Path

import pytest
import yaml

from mpunlearn.cli import main

DEFAULTS = "run model --objective npo --forget forget.jsonl --retain retain.jsonl --copies 2 --rounds 1"
WITH_FILE = "run model --forget forget.jsonl --retain retain.jsonl --config run.yaml --rounds 1"


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    assert main(["example", str(tmp_path / "try"), "--quiet"]) == 0
    monkeypatch.chdir(tmp_path / "try")
    return tmp_path / "try"


def test_its_own_options_unlearn_and_the_defaults_say_that_they_do_not(here: Path, capsys) -> None:
    # Two rounds: after one, the copies are far apart, because their noise is drawn anew in every run.
    assert main(f"{WITH_FILE} --out good --rounds 2".replace("--rounds 1 ", "").split()) == 0
    good = capsys.readouterr().err
    assert "nothing was unlearned" not in good
    assert main(f"{DEFAULTS} --out idle".split()) == 0
    idle = capsys.readouterr().err
    assert idle.count("mpunlearn run: warning: nothing was unlearned on copy 1 of 2, round 1") == 1
    assert "raise --learning-rate or --epochs" in idle
    assert idle.count("nothing was unlearned") == 1  # once for all copies of a round
    for log, dropped in ((good, True), (idle, False)):
        lines = [line for line in log.splitlines() if line.startswith("probability of forget answers")]
        before, after = (float(line.split(": ")[1].split(" -> ")[end]) for line, end in ((lines[0], 0), (lines[-1], 1)))
        assert (after < 0.1 * before) is dropped
        assert (after > 0.9 * before) is not dropped


def test_losses_stay_with_the_client(here: Path) -> None:
    """They would tell the server whether its guess of the text is right."""
    assert main(f"{WITH_FILE} --out run --keep-exchange --quiet".split()) == 0
    lines = [json.loads(line) for line in (here / "run/client/memory/losses.jsonl").read_text().splitlines()]
    assert [(line["round"], line["copy"]) for line in lines] == [(1, 1), (1, 2), (1, 3)]
    for line in lines:
        assert len(line["forget_loss"]) == len(line["retain_loss"]) == 10
        assert 0 < line["probability_after"] < line["probability_before"] <= 1
    crossed = [file for file in (here / "run" / "exchange").rglob("*") if file.suffix == ".json"]
    assert any(file.name == "update.json" for file in crossed)
    assert not any("loss" in file.read_text() for file in crossed)


def test_the_options_suit_every_verb_that_the_readme_gives_them_to(here: Path) -> None:
    from mpunlearn.cli import VERBS
    from mpunlearn.signatures import options_of

    given = set(yaml.safe_load((here / "run.yaml").read_text()))
    for verb in ("run", "server start"):
        assert given <= {option.name for option in options_of(VERBS[verb].function(verb))}
