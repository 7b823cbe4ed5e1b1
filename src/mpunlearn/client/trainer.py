"""The one training loop: `transformers.Trainer` over optimizer steps that are decided beforehand.

An item of its data set is one micro-batch, so the Trainer neither shuffles nor batches. Since the steps are known, every
micro-batch carries how many tokens and examples its whole step has, and divides by that: a step is the same mean however
many passes and processes it is spread over. (Averages of averages, the usual way, depend on both.)

Two gradients become one in three ways (`Objective.combine`). *sum*: γ · forget + α · retain. *normalized* (NGDiff, Bu et
al., arXiv 2410.22086): each gradient of a step is divided by its norm first, and now and then the learning rate moves to the
minimum of a parabola through the retain loss before, after and opposite the step (their section 4, after GeN). *dual* (PDU,
arXiv 2506.05314): α follows the retain loss, α ← max(0, α + dual_step · (L_retain - retain_target)), from epoch `dual_warmup`
of the run on; it starts anew in every round.

This module imports transformers at the top; import it where training begins.
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed
import transformers

from mpunlearn.client.batches import Batch, Examples, Pick, _MicroBatches, micro_batches
from mpunlearn.client.objectives import Objective
from mpunlearn.client.optimizer import NAME as TENSOR_ADAM
from mpunlearn.client.optimizer import TensorAdam
from mpunlearn.client.resources import Resources
from mpunlearn.errors import PlanError
from mpunlearn.files import read_json, write_json
from mpunlearn.lm.examples import IGNORED
from mpunlearn.lm.model import forward, pad_id
from mpunlearn.lm.processes import is_main, processes
from mpunlearn.progress import bar
from mpunlearn.protocol.plan import Training

_MARK = "dual.json"
"""Written into a checkpoint last."""


def train(
    model: Any,
    tokenizer: Any,
    objective: Objective,
    training: Training,
    resources: Resources,
    plan: list[list[Pick]],
    examples: Examples,
    *,
    reference: Any | None = None,
    first_epoch: int = 0,
    folder: Path,
) -> None:
    """Trains the model in place.

    Args:
        model: sharded where there are several processes.
        plan: the optimizer steps.
        reference: the reference model, where the objective takes its logits or hidden states; with LoRA it may be the model
            itself, whose adapters are then switched off.
        first_epoch: how many epochs of the run lie behind.
        folder: for checkpoints; if it holds one, training goes on from there.

    Raises:
        PlanError: an option's value is unknown to transformers, or options exclude one another.
    """
    if resources.save_every and processes() > 1:
        raise PlanError("--save-every: a training on several processes is not saved on its way; leave it out")
    if objective.combine == "normalized" and resources.precision == "float16":
        raise PlanError(
            f"--precision float16: {training.objective} divides by gradient norms; take bfloat16 or float32"
        )
    items, accumulated = micro_batches(plan, resources.micro_batch_size or training.batch_size, processes())
    dataset = _MicroBatches(items, accumulated * processes(), examples, pad_id(tokenizer))
    with _logging_to(resources.log_dir):
        try:
            arguments = transformers.TrainingArguments(
                output_dir=str(folder),
                num_train_epochs=1,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=accumulated,
                train_sampling_strategy="sequential",
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                max_grad_norm=training.max_grad_norm,
                lr_scheduler_type=training.scheduler,
                warmup_steps=training.warmup_steps,
                optim="adamw_torch" if training.optimizer == TENSOR_ADAM else training.optimizer,
                adam_epsilon=training.adam_epsilon,
                seed=training.seed,
                bf16=resources.precision == "bfloat16",
                fp16=resources.precision == "float16",
                **_checkpointing(resources.gradient_checkpointing),
                use_cpu=not torch.cuda.is_available(),
                save_strategy="steps" if resources.save_every else "no",
                save_steps=resources.save_every or 500,
                save_total_limit=1,
                logging_strategy="no" if resources.report_to == "none" else "steps",
                logging_steps=1,
                report_to=resources.report_to,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=True,
            )
            arguments._n_gpu = min(arguments.n_gpu, 1)  # a micro-batch is one item: it is not spread over GPUs
            trainer = _Trainer(
                objective,
                reference,
                first_epoch,
                len(plan) // training.epochs,
                model=model,
                args=arguments,
                train_dataset=dataset,
                data_collator=_first,
                callbacks=[_Bar(f"unlearning with {training.objective}")],
                optimizer_cls_and_kwargs=_own_optimizer(training),
            )
        except (ValueError, ImportError) as error:
            raise PlanError(f"the training options do not fit: {error}") from error
        trainer.remove_callback(transformers.PrinterCallback)
        saved = _last_whole_checkpoint(folder)
        if saved is not None:
            trainer.dual = read_json(saved / _MARK).get("dual", trainer.dual)
        try:
            with _old_objects_set_aside():
                trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
        finally:
            # They refer to one another in a circle, in which the model would live on until a collector happens by.
            for part in (trainer.callback_handler, trainer.accelerator, trainer):
                part.__dict__.clear()


@contextlib.contextmanager
def _old_objects_set_aside() -> Iterator[None]:
    """Keeps the garbage collector from looking through everything that was ever imported, each time that training begins.

    accelerate collects then, which for a small model takes longer than a round of training.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end; one that a kill cut short lacks the mark."""
    whole = [mark.parent for mark in folder.glob(f"checkpoint-*/{_MARK}")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


class _Trainer(transformers.Trainer):  # type: ignore[misc]
    """Computes an objective's two losses of a micro-batch, and combines their gradients."""

    def __init__(
        self, objective: Objective, reference: Any | None, first_epoch: int, steps_per_epoch: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.objective, self.dual = objective, objective.alpha
        self._reference, self._first_epoch, self._steps_per_epoch = reference, first_epoch, steps_per_epoch
        self._retain_gradients: dict[torch.Tensor, torch.Tensor | None] = {}
        self._losses = {"forget_loss": 0.0, "retain_loss": 0.0}
        self._step_retain_loss = 0.0
        self._control: torch.Tensor | None = None
        if reference is not None and reference is not self.model:
            reference.to(self.args.device).eval().requires_grad_(False)
        if objective.combine == "normalized":
            self.add_callback(_AdaptiveRate(self, int(objective.parameters["adapt_every"])))
        self.add_callback(_Dual(self))

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """With several processes the model is sharded already, and stays as it is."""
        return model if processes() == 1 else _Wrapped(model)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Both backward passes of a micro-batch, one after the other, so that one side's activations are held at a time."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        forget = self._backward(model, inputs, "forget", self.objective.gamma)
        retain = forget.new_zeros(())
        if self.objective.alpha:
            normalized = self.objective.combine == "normalized"
            if normalized:
                self._swap()
            alpha = self.dual if self.objective.combine == "dual" else self.objective.alpha
            retain = self._backward(model, inputs, "retain", alpha)
            if normalized:
                self._swap()
                if self.accelerator.sync_gradients:
                    self._combine_normalized()
        self._losses["forget_loss"] += float(forget)
        self._losses["retain_loss"] += float(retain)
        self._step_retain_loss += float(retain)
        return self.objective.gamma * forget + self.objective.alpha * retain

    def _backward(self, model: Any, inputs: Batch, side: str, weight: float) -> torch.Tensor:
        """Adds the gradient of weight · loss; returns the micro-batch's share of the step's loss."""
        with self.compute_loss_context_manager():
            share = self.loss(model, inputs, side)
        # Processes are averaged over, but their shares add up.
        self.accelerator.backward(weight * share * processes())
        return share.detach()

    def loss(self, model: Any, inputs: Batch, side: str) -> torch.Tensor:
        """A micro-batch's share of the forget or retain loss of its step, a scalar."""
        objective, batch = self.objective, inputs[side]
        needs = objective.needs if side == "forget" else objective.retain_needs
        layer = int(objective.parameters["layer"]) if "hidden" in needs else None
        found = forward(model, batch, layer)
        if needs & {"reference_logits", "reference_hidden"}:
            found |= {f"reference_{name}": value for name, value in self._under_reference(batch, layer).items()}
        if "reference_nll" in batch:
            found["reference_nll"] = batch["reference_nll"]
        if objective.alternates and side == "forget":
            other = {**forward(model, inputs["alternate"]), "reference_nll": inputs["alternate"]["reference_nll"]}
            found |= {f"alternate_{name}": value for name, value in other.items()}
        if "control" in needs:
            found["control"] = self._control_vector(found["hidden"])
        given = {name: found[name] for name in needs}
        values = objective.forget(**given) if side == "forget" else objective.retain(**given)
        counted = found["targets"] != IGNORED
        if values.dim() == 1:
            values, total = values[counted.any(dim=1)], batch["step_examples"]
        else:
            total = batch["step_tokens"]
        # The last term is zero: a shard whose parameters a loss does not reach must still take part in the backward pass.
        share: torch.Tensor = values.sum() / total + 0.0 * found["logits"].float().sum()
        return share

    @torch.no_grad()
    def _under_reference(self, batch: Batch, layer: int | None) -> dict[str, torch.Tensor]:
        if self._reference is not self.model:
            return forward(self._reference, batch, layer)
        model: Any = self.model
        training = model.training
        model.eval()
        with model.disable_adapter():
            found = forward(model, batch, layer)
        model.train(training)
        return found

    def _control_vector(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._control is None:
            generator = torch.Generator().manual_seed(self.args.seed)
            vector = torch.rand(hidden.shape[-1], generator=generator)
            self._control = (vector / vector.norm()).to(hidden.device)
        return self._control

    def trained(self) -> list[torch.Tensor]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _swap(self) -> None:
        """Exchanges the gradients of the two losses."""
        for parameter in self.trained():
            parameter.grad, other = self._retain_gradients.pop(parameter, None), parameter.grad
            self._retain_gradients[parameter] = other

    def _combine_normalized(self) -> None:
        """γ · g_forget / ‖g_forget‖ + α · g_retain / ‖g_retain‖; γ and α are in the gradients' losses, so they are put back."""
        forget = [parameter.grad for parameter in self.trained() if parameter.grad is not None]
        retain = [gradient for gradient in self._retain_gradients.values() if gradient is not None]
        for gradients, weight in ((forget, self.objective.gamma), (retain, self.objective.alpha)):
            norm = _number(torch.nn.utils.get_total_norm(gradients))
            for gradient in gradients:
                gradient.mul_(weight / norm if norm else 0.0)
        for parameter in self.trained():
            other = self._retain_gradients.pop(parameter, None)
            if other is not None:
                parameter.grad = other if parameter.grad is None else parameter.grad.add_(other)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step_retain_loss(self) -> float:
        """The retain loss of the step that is being finished, over all micro-batches and processes; then forgotten."""
        value, self._step_retain_loss = self.summed(self._step_retain_loss), 0.0
        return value

    def summed(self, value: float) -> float:
        """The sum over all processes."""
        if processes() == 1:
            return value
        total = torch.tensor(value, device=self.args.device, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return float(total)

    def epoch_of_run(self) -> int:
        """How many epochs of the run are complete."""
        return int(self._first_epoch + self.state.global_step // self._steps_per_epoch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds both losses, as this process saw them."""
        if "loss" in logs:
            logs = {**logs, **self._losses}
            self._losses = dict.fromkeys(self._losses, 0.0)
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0


class _Wrapped(torch.nn.Module):
    """A model that is sharded already, so that nothing else wraps it."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


class _Dual(transformers.TrainerCallback):  # type: ignore[misc]
    """PDU's dual variable: moved after each step, kept with each checkpoint."""

    def __init__(self, trainer: _Trainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, parameters = self._trainer, self._trainer.objective.parameters
        loss = trainer.step_retain_loss()
        if trainer.objective.combine == "dual" and trainer.epoch_of_run() >= parameters["dual_warmup"]:
            trainer.dual = max(0.0, trainer.dual + parameters["dual_step"] * (loss - parameters["retain_target"]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_main():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / _MARK, {"dual": self._trainer.dual})


class _AdaptiveRate(transformers.TrainerCallback):  # type: ignore[misc]
    """NGDiff's learning rate: every few steps it is multiplied so that a step ends at the minimum of a parabola.

    The parabola goes through the retain loss of a micro-batch at w + d, w and w - d, where w - d is what the optimizer made of
    w. The factor is kept within [1/2, 2], and is 1 where the parabola has no minimum.
    """

    def __init__(self, trainer: _Trainer, every: int) -> None:
        self._trainer, self._every = trainer, max(1, every)
        self._before: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._before = [parameter.detach().clone() for parameter in self._trainer.trained()]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._before:
            return
        trainer, parameters, before = self._trainer, self._trainer.trained(), self._before
        self._before = []
        after = [parameter.detach().clone() for parameter in parameters]
        inputs = trainer._prepare_inputs(trainer.train_dataset.of_step(state.global_step))
        trainer.model.eval()
        losses = []
        for way in (-1.0, 0.0, 1.0):  # after, before, and opposite
            for parameter, w, moved in zip(parameters, before, after, strict=True):
                parameter.copy_(w + way * (w - moved))
            losses.append(trainer.summed(float(trainer.loss(trainer.model, inputs, "retain"))))
        ahead, here, opposite = losses
        curvature = ahead - 2 * here + opposite
        best = (opposite - ahead) / (2 * curvature) if curvature > 0 else 1.0
        factor = min(2.0, max(0.5, best))
        for parameter, w, moved in zip(parameters, before, after, strict=True):
            parameter.copy_(w + factor * (moved - w))
        scheduler = trainer.lr_scheduler
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        trainer.model.train()


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


def _own_optimizer(training: Training) -> tuple[type[TensorAdam], dict[str, Any]] | None:
    """The optimizer that transformers does not have, where it is asked for."""
    if training.optimizer != TENSOR_ADAM:
        return None
    return TensorAdam, {"lr": training.learning_rate, "eps": training.adam_epsilon}


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The arguments for recomputing activations, by the name that this version of transformers has for them."""
    known = transformers.TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


@contextlib.contextmanager
def _logging_to(folder: str | None) -> Iterator[None]:
    """Tells tensorboard's callback where its files go, which takes that from the environment only."""
    if folder is None:
        yield
        return
    kept = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = folder
    try:
        yield
    finally:
        if kept is None:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
        else:
            os.environ["TENSORBOARD_LOGGING_DIR"] = kept


def _number(norm: torch.Tensor) -> float:
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _first(items: list[Batch]) -> Batch:
    [batch] = items
    return batch
