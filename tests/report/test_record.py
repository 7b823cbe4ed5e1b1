"""The record in the report of a real run."""

from pathlib import Path

from tests.perturbations import without_offset

from mpunlearn.local import run
from mpunlearn.protocol.plan import Training
from mpunlearn.report.record import record_summary


def test_the_report_has_the_number_the_rounds_and_what_is_wrong(save_tiny, tmp_path: Path, examples) -> None:
    forget, retain = examples
    training = Training(epochs=1, batch_size=3, learning_rate=1e-3, max_length=64)
    noise = without_offset(copies=2)
    out = tmp_path / "run"
    run(save_tiny(), forget=forget, retain=retain, out=out, rounds=2, perturbation=noise, training=training)
    assert record_summary(tmp_path / "model") is None
    found = record_summary(out)
    assert found is not None
    assert found.valid
    assert found.number.startswith("mpu:")
    expected = "2 copies were published, 2 updates were signed by clients, the updates were aggregated."
    assert [text for _, text in found.events] == [f"Round 1: {expected}", f"Round 2: {expected}"]
    (out / "final" / "config.json").write_text("{}")
    changed = record_summary(out)
    assert changed is not None
    assert not changed.valid
    assert "config.json: changed" in changed.problems[0]
