"""The comparison with OpenUnlearning, whose code is not part of the repository."""

import os
import sys
from pathlib import Path

import pytest

import parity

CHECKOUT = os.environ.get("MPUNLEARN_OPENUNLEARNING")


def test_without_a_checkout_it_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["parity.py", "--openunlearning", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        parity.main()
    assert stopped.value.code == 2
    assert "expected a checkout of OpenUnlearning, found no src/evals" in capsys.readouterr().err


def test_a_failure_of_their_code_names_the_python(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="OpenUnlearning's evaluation failed under .* --python PATH"):
        parity.theirs(parity.FORMATS["no template"], tmp_path, sys.executable, tmp_path)


def test_the_overview_shows_the_largest_difference() -> None:
    one = {"OpenUnlearning": 0.5, "openunlearning": 0.25, "strict": 0.125}
    table = parity.overview({"a": {"m": one}, "b": {"m": {**one, "openunlearning": 0.5}, "n": one}})
    assert "| m | 2e-01 | 0.250 / 0.125 | 0.500 / 0.125 |" in table
    assert "| n | 2e-01 |  | 0.250 / 0.125 |" in table


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="MPUNLEARN_OPENUNLEARNING names no checkout")
def test_every_metric_is_equal(tmp_path: Path) -> None:
    rows = parity.read(None, 6)
    for number, how in enumerate(parity.FORMATS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        values = parity.compared(how, rows, Path(str(CHECKOUT)) / "src", sys.executable, folder)
        assert len(values) >= 22
        for metric, of in values.items():
            assert of["openunlearning"] == pytest.approx(of["OpenUnlearning"], rel=1e-5, abs=1e-6), metric
