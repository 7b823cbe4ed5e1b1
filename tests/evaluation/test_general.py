"""General ability through lm-eval, on a task of our own, without a network."""

import json
from pathlib import Path

import pytest

from mpunlearn.errors import PlanError
from mpunlearn.evaluation.general import general_ability


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_lm_eval_are_run(save_tiny, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"Is {n} more than 4? ", "choices": ["yes", "no"], "answer": int(n <= 4)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "more.yaml").write_text(
        f"""
task: more_than_four
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    metrics = general_ability(save_tiny(), ["more_than_four"], tmp_path / "tasks")
    assert set(metrics) == {"more_than_four/acc"}
    assert metrics["more_than_four/acc"] in [n / 8 for n in range(9)]
    with pytest.raises(PlanError, match="lm-eval has no task nonsense"):
        general_ability(save_tiny(), ["nonsense"])
