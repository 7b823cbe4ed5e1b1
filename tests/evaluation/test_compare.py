"""Several checkpoints in one table, one figure and one file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import FileError, PlanError
from mpunlearn.evaluation import measurement
from mpunlearn.evaluation.compare import STAR, cell
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.lm.model import load


def test_a_cell_shows_interval_and_difference() -> None:
    assert cell(None) == ""
    assert cell(0.5, [0.25, 0.75]) == "0.500 [0.250, 0.750]"
    assert cell(0.5, [0.25, 0.75], [0.1, 0.2]) == "0.500 [0.250, 0.750] *"
    assert cell(0.5, None, [-0.2, -0.1]) == "0.500 *"
    assert cell(0.5, None, [-0.1, 0.1]) == "0.500"
    assert cell(float("nan"), [float("nan")] * 2, [float("nan")] * 2) == "nan"


def test_checkpoints_are_compared_in_one_table_figure_and_file(save_tiny, tmp_path: Path, monkeypatch) -> None:
    rows = generate_rows(0, Recipe())
    for name in ("forget", "retain", "holdout"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name][:8]))
    paths = [save_tiny(name) for name in ("first", "same", "worse")]
    model, _ = load(paths[2])
    with torch.no_grad():
        model.lm_head.weight.mul_(-3)
    model.save_pretrained(paths[2])
    options: dict[str, Any] = {"benchmark": str(tmp_path), "cache": tmp_path / "cache", "max_new_tokens": 2}
    options |= {"retain_model": paths[0], "compare": paths[1:]}
    out, figure = tmp_path / "result.json", tmp_path / "figure.svg"
    found = evaluate(paths[0], out=out, figure=figure, original_model=paths[2], **options)
    same, worse = (found.compared[str(path)] for path in paths[1:])
    assert same.metrics == found.metrics
    assert same.intervals == found.intervals
    defined = {name: pair for name, pair in same.differences.items() if not np.isnan(pair).any()}
    assert {name: pair for name, pair in defined.items() if pair != [0, 0]} == {}
    assert set(same.differences) - set(defined) <= {"privleak", "utility_score", "overall_score"}
    assert worse.metrics["forget_Q_A_Prob"] == pytest.approx(np.mean(worse.per_example["forget"]["Q_A_Prob"]))
    low, high = worse.differences["forget_Q_A_Prob"]
    assert low <= worse.metrics["forget_Q_A_Prob"] - found.metrics["forget_Q_A_Prob"] <= high < 0
    low, high = found.intervals["forget_Q_A_Prob"]
    assert low < found.metrics["forget_Q_A_Prob"] < high
    header, _, *lines = found.table().splitlines()
    assert header == f"| metric | {' | '.join(map(str, paths))} | retrained |"
    [line] = [line for line in lines if line.startswith("| forget_Q_A_Prob |")]
    assert [column.endswith("*") for column in line.strip("| ").split(" | ")] == [False, False, False, True, False]
    assert found.table().endswith(STAR)
    written = json.loads(out.read_text())
    assert written["format"] == 3
    assert set(written["compared"]) == {str(path) for path in paths[1:]}
    drawn = figure.read_text()
    assert "<svg" in drawn
    with pytest.raises(FileError, match=r"--figure .*figure\.svg: already exists"):
        evaluate(paths[0], figure=figure, **options)
    monkeypatch.setattr(measurement, "measured", None)
    for name, match in {"figure.txt": r"ends in \.svg, \.png or \.pdf"}.items():
        with pytest.raises(PlanError, match=match):
            evaluate(paths[0], figure=tmp_path / name, **options)
    with pytest.raises(PlanError, match="--compare: .* found one twice"):
        evaluate(paths[1], **options)
