"""Trains with OpenUnlearning's own trainers, for `parity_time.py`."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset, SequentialSampler

TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "grad-ascent": ("grad_ascent.GradAscent", {}),
    "grad-diff": ("grad_diff.GradDiff", {"gamma": 1.0, "alpha": 1.0}),
    "npo": ("npo.NPO", {"beta": 0.1, "gamma": 1.0, "alpha": 1.0}),
    "dpo": ("dpo.DPO", {"beta": 0.1, "gamma": 1.0, "alpha": 1.0}),
    "simnpo": ("simnpo.SimNPO", {"beta": 4.5, "delta": 0.0, "gamma": 0.125, "alpha": 1.0}),
    "undial": ("undial.UNDIAL", {"beta": 10.0, "gamma": 1.0, "alpha": 0.0}),
    "satimp": ("satimp.SatImp", {"beta1": 5.0, "beta2": 1.0, "gamma": 0.1, "alpha": 1.0}),
    "wga": ("wga.WGA", {"beta": 1.0, "gamma": 1.0, "alpha": 1.0}),
    "ce-u": ("ceu.CEU", {"ignore_first_n_answer_tokens": 1}),
}
"""Objective → their module and class, with the hyperparameters of its configuration."""
ALTERNATES = ("dpo",)


class Paired(Dataset[dict[str, Any]]):
    """Forget examples, each with its retain example, in the order in which they are trained."""

    def __init__(self, forget: Any, retain: Any, picks: list[tuple[int, int | None]]) -> None:
        self._forget, self._retain, self._picks = forget, retain, picks

    def __len__(self) -> int:
        return len(self._picks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        forget, retain = self._picks[index]
        pair = {"forget": self._forget[forget]}
        return pair if retain is None else {**pair, "retain": self._retain[retain]}


def trainer(theirs: Any, objective: str, checkpoint: Any) -> Any:
    """A function that trains and returns the trained weights.

    Args:
        theirs: a `parity_theirs.Theirs`, for data sets and collators.
        objective: one of `TRAINERS`.
        checkpoint: what is trained.
    """
    job, (name, options) = theirs.job, TRAINERS[objective]
    package = types.ModuleType("trainer")  # its own __init__ imports deepspeed
    package.__path__ = [str(Path(job["source"]) / "trainer")]
    sys.modules.setdefault("trainer", package)
    module, class_name = name.split(".")
    kind = getattr(importlib.import_module(f"trainer.unlearn.{module}"), class_name)

    class Adapted(kind):  # type: ignore[misc, valid-type]
        """The trainer under a current version of transformers, with the given order of examples."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return super().compute_loss(model, inputs, return_outputs)

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    forget = theirs.questions("forget.jsonl")
    if objective in ALTERNATES:
        arguments = (theirs.rows("forget.jsonl"), job["template_args"], theirs.tokenizer)
        forget = theirs.data.QAwithAlternateDataset("alternate", True, *arguments)
    data = Paired(forget, theirs.questions("retain.jsonl"), job["picks"])
    arguments = transformers.TrainingArguments(
        output_dir=str(theirs.folder / "trainer"),
        per_device_train_batch_size=job["training"]["batch_size"],
        num_train_epochs=1,  # the picks are those of all epochs
        learning_rate=job["training"]["learning_rate"],
        optim=job["training"]["optimizer"],
        max_grad_norm=job["training"]["max_grad_norm"],
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        logging_steps=5,
        seed=0,
        remove_unused_columns=False,
        use_cpu=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).float()
    collator = theirs.collators.DataCollatorForSupervisedDataset(theirs.tokenizer)
    made = Adapted(model=model, args=arguments, train_dataset=data, data_collator=collator, **options)

    def train() -> dict[str, torch.Tensor]:
        made.train()
        return dict(model.state_dict())

    return train
