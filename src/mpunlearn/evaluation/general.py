"""General ability on the tasks of `lm-eval` (github.com/EleutherAI/lm-evaluation-harness), which is an optional extra.

The harness loads the checkpoint itself and has its own prompts and metrics. This module only flattens the names of its
results. Not covered: the harness's options, such as the number of shots, beyond what a task file sets.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mpunlearn.errors import DataError, PlanError
from mpunlearn.extras import needs


def general_ability(
    checkpoint: str | Path,
    tasks: Sequence[str],
    tasks_folder: str | Path | None = None,
    *,
    device: str | None = None,
    precision: str = "float32",
    batch_size: int | None = None,
    chat: bool = False,
) -> dict[str, float]:
    """Every metric of every task, named task/metric, without standard errors.

    Args:
        checkpoint: a checkpoint directory.
        tasks: names that lm-eval knows, such as arc_easy.
        tasks_folder: a folder with your own task files.
        device: device of the model (default: a GPU if there is one).
        precision: dtype of the weights.
        batch_size: number of sequences in a batch (default: lm-eval's own).
        chat: whether questions are asked in the model's chat template.

    Raises:
        MissingPackageError: lm-eval is not installed.
        PlanError: it has no such task.
        DataError: a task's data cannot be loaded.
    """
    needs("lm-eval", "--tasks")
    import lm_eval
    import torch

    manager = _task_manager(None if tasks_folder is None else str(tasks_folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise PlanError(
            f"--tasks: lm-eval has no task {', '.join(unknown)}; check the spelling, or give the folder with your own "
            "task files as --tasks-folder"
        )
    try:
        evaluation = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={checkpoint},dtype={precision}",
            tasks=list(tasks),
            task_manager=manager,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            batch_size=batch_size,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=False,
            verbosity="ERROR",
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--tasks {','.join(tasks)}: {reason}; is the task's data cached, or the Hugging Face Hub reachable?"
        ) from error
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, values in evaluation["results"].items()
        for metric, value in values.items()
        if isinstance(value, float | int) and "stderr" not in metric and metric != "sample_len"
    }


@cache
def _task_manager(folder: str | None) -> Any:
    """lm-eval's tasks and those of a folder. Finding them takes seconds, and several checkpoints may be measured."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)
