"""Compartments: every text has one owner, and the table holds means over seeds."""

from pathlib import Path

from compartments import HEADER, OWN, table, texts
from mpunlearn.demo.models import trained_world


def test_no_text_outside_is_the_clients(tmp_path: Path) -> None:
    files = {name: set(path.read_text().splitlines()) for name, path in texts(trained_world(0), tmp_path).items()}
    assert len(files["own"]) == OWN
    assert not files["outside"] & files["retain"]
    assert files["own"] | files["public"] == files["retain"]


def test_the_table_has_means_over_seeds() -> None:
    numbers = [("npo", "compartment", seed, 0.08, 0.04, 0.02, 0.9, outside) for seed, outside in ((0, 0.7), (1, 0.8))]
    *_, last = table([dict(zip(HEADER, map(str, row), strict=True)) for row in numbers]).splitlines()
    assert last == "| npo | compartment | 8.0% | 0.040 | 0.020 | 0.900 | 0.750 | 2 |"
