"""The real lm-eval, without a network: its own task wmdp_bio on a mirror, and tasks of our own.

`make lm-eval-test` installs lm-eval into an environment of its own and runs these tests. They are skipped without it.
"""

import json
from pathlib import Path

import pytest
from tests import mirrors

from mpunlearn.errors import DataError, PlanError
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.evaluation.general import general_ability

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.lm_eval, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of our own, whose answer must be the text of a choice."""
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
    return tmp_path / "tasks"


def test_a_task_of_our_own_is_run(save_tiny, tasks: Path) -> None:
    metrics = general_ability(save_tiny(), ["more_than_four"], tasks)
    assert set(metrics) == {"more_than_four/acc"}
    assert metrics["more_than_four/acc"] in [n / 8 for n in range(9)]


def test_what_lm_eval_cannot_run_is_named(save_tiny, tasks: Path, tmp_path: Path) -> None:
    path = save_tiny()
    with pytest.raises(PlanError, match="lm-eval has no task nonsense"):
        general_ability(path, ["nonsense"])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="--tasks more_than_four: .*is the task's data cached, or the"):
        general_ability(path, ["more_than_four"], tasks)


def test_device_precision_batch_size_and_chat_template_reach_lm_eval(save_tiny, tasks: Path, monkeypatch) -> None:
    import torch
    from lm_eval.models.huggingface import HFLM

    seen: list[tuple[torch.dtype, str, int, list[str]]] = []
    real = HFLM.loglikelihood

    def spy(self, requests, *arguments, **options):
        kind = next(self.model.parameters())
        seen.append((kind.dtype, kind.device.type, self.batch_size, [request.args[0] for request in requests]))
        return real(self, requests, *arguments, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", spy)
    path = save_tiny()
    general_ability(path, ["more_than_four"], tasks)
    general_ability(path, ["more_than_four"], tasks, device="cpu", precision="bfloat16", batch_size=3, chat=True)
    (plain, chat) = seen
    assert plain[:3] == (torch.float32, "cpu", 1)
    assert chat[:3] == (torch.bfloat16, "cpu", 3)
    assert plain[3][0] == "Is 0 more than 4? "
    assert chat[3][0].startswith("<|user|>")
    assert "Is 0 more than 4?" in chat[3][0]


def test_our_accuracy_on_wmdp_is_that_of_lm_eval(save_tiny, tmp_path: Path, monkeypatch) -> None:
    """The real tasks wmdp_bio and wmdp_cyber: in the folder of the mirror, `datasets` takes cais/wmdp for that folder."""
    root = mirrors.wmdp(tmp_path / "data", questions=40)
    path = save_tiny(max_position_embeddings=512)
    monkeypatch.chdir(root)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    accuracies = set()
    for domain in ("bio", "cyber", "chem"):
        name, task = f"wmdp/{domain}", f"wmdp_{domain}"
        evaluation = evaluate(path, benchmark=name, tasks=task, data_root=root, cache=tmp_path / "cache", batch_size=4)
        assert evaluation.metrics["wmdp_acc"] == evaluation.metrics[f"{task}/acc"]
        accuracies.add(evaluation.metrics["wmdp_acc"])
    assert accuracies - {0.0, 1.0}
    group = general_ability(path, ["wmdp"])
    assert group["wmdp/acc"] == pytest.approx(sum(group[f"wmdp_{name}/acc"] for name in ("bio", "cyber", "chem")) / 3)
