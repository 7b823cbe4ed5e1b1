"""The one training loop: `transformers.Trainer` over batches that are decided beforehand.

The plan of batches is a list, so the Trainer neither shuffles nor batches: one item of its data set is one batch. This
module imports transformers at the top; import it where training begins.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from mpunlearn.client.dataset import Example, collate
from mpunlearn.client.objectives import Objective, answer_nll, cross_entropy
from mpunlearn.errors import CheckpointError, PlanError
from mpunlearn.progress import bar
from mpunlearn.protocol.plan import Training

Batch = dict[str, Any]


def load(path: Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: transformers cannot load them.
    """
    quiet()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def on_disk(model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's parameters under the names and in the shapes that its checkpoint has on disk.

    They differ where transformers keeps several of a checkpoint's tensors as one, such as the experts of a mixture.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, parameters)
    return found


def quiet() -> None:
    """Silences transformers' bars for loading and saving; errors and warnings stay."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


@torch.no_grad()
def nll(model: Any, examples: list[Example], batch_size: int, tokenizer: Any) -> list[float]:
    """NLL(y|x) of each example under the model, in nats."""
    model.eval()
    values: list[float] = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id(tokenizer))
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        values += answer_nll(_logits(model, batch), batch["labels"]).tolist()
    return values


def pad_id(tokenizer: Any) -> int:
    """Any token will do: padding is masked and carries no loss."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def train(
    model: Any,
    tokenizer: Any,
    objective: Objective,
    training: Training,
    plan: list[list[tuple[int, int | None]]],
    forget: list[Example],
    retain: list[Example],
    reference_nll: list[float] | None,
) -> None:
    """Trains the model in place.

    Args:
        plan: the batches, as pairs of indices into `forget` and `retain`.
        reference_nll: NLL of each forget example under the reference model, where the objective needs it.

    Raises:
        PlanError: the schedule's name is unknown to transformers.
    """
    dataset = _Batches(plan, forget, retain, reference_nll, pad_id(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        try:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=1,
                train_sampling_strategy="sequential",
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                max_grad_norm=training.max_grad_norm,
                lr_scheduler_type=training.scheduler,
                warmup_steps=training.warmup_steps,
                optim="adamw_torch",
                seed=training.seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=True,
            )
            arguments._n_gpu = min(arguments.n_gpu, 1)  # a plan's batch is one item: it is not spread over GPUs
        except ValueError as error:
            raise PlanError(f"the training options do not fit: {error}") from error
        progress = _Bar(f"unlearning with {training.objective}")
        trainer = _Trainer(
            objective, model=model, args=arguments, train_dataset=dataset, data_collator=_first, callbacks=[progress]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if arguments.world_size > 1:
            raise PlanError("training on several processes is not supported yet; start one")
        trainer.train()


class _Batches(Dataset[Batch]):
    """Item i is the i-th batch of the plan."""

    def __init__(
        self,
        plan: list[list[tuple[int, int | None]]],
        forget: list[Example],
        retain: list[Example],
        reference_nll: list[float] | None,
        pad: int,
    ) -> None:
        self._plan, self._forget, self._retain, self._reference_nll, self._pad = (
            plan,
            forget,
            retain,
            reference_nll,
            pad,
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, item: int) -> Batch:
        pairs = self._plan[item]
        batch: Batch = {"forget": collate([self._forget[f] for f, _ in pairs], self._pad)}
        retained = [self._retain[r] for _, r in pairs if r is not None]
        if retained:
            batch["retain"] = collate(retained, self._pad)
        if self._reference_nll is not None:
            batch["reference_nll"] = torch.tensor([self._reference_nll[f] for f, _ in pairs])
        return batch


class _Trainer(transformers.Trainer):  # type: ignore[misc]
    """Computes γ · L_forget + α · L_retain of a batch."""

    def __init__(self, objective: Objective, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._objective = objective

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        objective, forget = self._objective, inputs["forget"]
        extra = {} if objective.beta is None else {"beta": objective.beta}
        if objective.reference:
            extra["reference_nll"] = inputs["reference_nll"]
        loss = objective.gamma * objective.forget_loss(_logits(model, forget), forget["labels"], **extra)
        if objective.alpha:
            retain = inputs["retain"]
            loss = loss + objective.alpha * cross_entropy(_logits(model, retain), retain["labels"])
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0


class _Bar(transformers.TrainerCallback):  # type: ignore[misc]
    """One bar of our own instead of the Trainer's, which leaves a line behind for every copy."""

    def __init__(self, what: str) -> None:
        self._what = what

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = bar(state.max_steps, self._what)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def _first(items: list[Batch]) -> Batch:
    [batch] = items
    return batch
