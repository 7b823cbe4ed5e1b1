"""Device, precision and batch size of an evaluation: honored, and without influence on what is measured."""

import json
from pathlib import Path

import pytest
import torch

from mpunlearn import evaluate, forget, unlearn
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import PlanError
from mpunlearn.evaluation import measurement, probe
from mpunlearn.evaluation.sets import SETS
from mpunlearn.lm.model import load_model
from mpunlearn.protocol.plan import Training


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    rows = generate_rows(0, Recipe())
    (tmp_path / "benchmark").mkdir()
    for name in SETS:
        lines = "".join(json.dumps(row) + "\n" for row in rows[name][:5])
        (tmp_path / "benchmark" / f"{name}.jsonl").write_text(lines)
    return str(tmp_path / "benchmark")


def test_metrics_do_not_depend_on_the_batch_size(save_tiny, tmp_path: Path, benchmark: str, monkeypatch) -> None:
    path, sizes = save_tiny(), []
    collate = probe.collate
    monkeypatch.setattr(probe, "collate", lambda batch, pad: sizes.append(len(batch)) or collate(batch, pad))
    results = []
    for size in (None, 1, 3):
        sizes.clear()
        results.append(
            evaluate(path, benchmark=benchmark, max_new_tokens=4, batch_size=size, cache=tmp_path / f"cache-{size}")
        )
        assert (max(sizes) <= size) if size else (max(sizes) > 3)
        assert results[-1].provenance["batch_size"] == size
    for result in results[1:]:
        assert result.metrics == pytest.approx(results[0].metrics, rel=1e-5, abs=1e-5)


def test_precision_is_that_of_the_weights(save_tiny, tmp_path: Path, benchmark: str, monkeypatch) -> None:
    path, dtypes = save_tiny(), []

    def noted(*arguments):
        model, tokenizer = load(*arguments)
        dtypes.append((model.dtype, model.device.type))
        return model, tokenizer

    load = measurement.load
    monkeypatch.setattr(measurement, "load", noted)
    options = {"benchmark": benchmark, "max_new_tokens": 4, "cache": tmp_path / "cache", "device": "cpu"}
    full, half = evaluate(path, **options), evaluate(path, **options, precision="bfloat16")
    assert dtypes == [(torch.float32, "cpu"), (torch.bfloat16, "cpu")]  # the second one is not taken from the cache
    assert full.metrics != half.metrics
    assert half.metrics["forget_Q_A_Prob"] == pytest.approx(full.metrics["forget_Q_A_Prob"], rel=0.1)
    assert evaluate(path, **options, batch_size=2).metrics == full.metrics
    assert len(dtypes) == 2
    with pytest.raises(PlanError, match="--robustness trains the model"):
        evaluate(path, **options, precision="float16", robustness=True)


def test_a_device_that_is_not_there_is_refused_at_once(save_tiny, tmp_path: Path, benchmark: str, examples) -> None:
    path, (texts, _) = save_tiny(), examples
    for device, message in (
        ("cuda:99", "not available on this machine"),
        ("gpu", "not available"),
        ("meta", "found meta"),
    ):
        with pytest.raises(PlanError, match=f"--device.*{message}"):
            evaluate(path, benchmark=benchmark, device=device, cache=tmp_path / "cache")
        for verb in (unlearn, forget):
            with pytest.raises(PlanError, match=f"--device.*{message}"):
                verb(path, forget=texts, out=tmp_path / "out", device=device, training=Training("grad-ascent"))
    assert not (tmp_path / "out").exists()
    assert load_model(path, "cpu").device.type == "cpu"


def test_training_runs_on_the_device_that_is_named(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    from mpunlearn.client import client

    devices = []
    monkeypatch.setattr(client, "load_model", lambda path, device: devices.append(device) or load_model(path, device))
    training = Training("grad-ascent", epochs=1, learning_rate=1e-3)
    unlearn(save_tiny(), forget=examples[0], out=tmp_path / "out", device="cpu", training=training)
    assert devices == ["cpu"]
