"""The table of the benchmark of common noise, and that its arms exist."""

from disclosure import ARMS, HEADER, table


def test_the_deviation_is_that_from_noise_free_at_the_same_seed() -> None:
    numbers = [
        ("npo", "noise-free", 0, 0.0, 0.1, 0.9),
        ("npo", "noise-free", 1, 0.0, 0.2, 0.8),
        ("npo", "lean", 0, 0.1, 0.11, 0.88),
        ("npo", "lean", 1, 0.1, 0.17, 0.8),
    ]
    rows = [dict(zip(HEADER, map(str, row), strict=True)) for row in numbers]
    *_, last = table(rows).splitlines()
    assert last == "| npo | lean | 10.0% | 0.140 | 0.840 | 1.5 | 2 |"


def test_calibrated_arms_are_the_presets() -> None:
    arms = {name: make() for name, make in ARMS.items()}
    assert {name for name, arm in arms.items() if arm.calibrated} == {"hardened", "lean"}
    assert arms["lean"].rounds * arms["lean"].epochs == arms["noise-free"].rounds * arms["noise-free"].epochs
