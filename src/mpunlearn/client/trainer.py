"""The training loop: runs the optimizer steps planned in `batches`, on one process or several.

One plain loop serves all objectives. For every micro-batch it computes the forget and the retain loss and a backward
pass for each, and calls the hooks of a `Combination` (see `combine`) in between. Then it clips the gradients and takes
the optimizer step. It does not build on `transformers.Trainer`, which makes its own decisions about batches, loss
averaging and model wrapping. Optimizers and schedulers come from transformers, experiment trackers from accelerate.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from mpunlearn.checkpoint import FLOAT_DTYPES
from mpunlearn.client.batches import Batch, MicroBatches
from mpunlearn.client.combine import COMBINATIONS
from mpunlearn.client.objectives import Losses
from mpunlearn.client.optimizer import make_optimizer
from mpunlearn.client.resources import Callback, Resources
from mpunlearn.client.saving import Saved
from mpunlearn.client.sharpness import Sharpness
from mpunlearn.errors import PlanError
from mpunlearn.extras import needs
from mpunlearn.lm.examples import IGNORED
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward
from mpunlearn.lm.processes import compute_device, is_main, processes, total
from mpunlearn.progress import Progress
from mpunlearn.protocol.plan import Training

logger = logging.getLogger(__name__)


@dataclass
class History:
    """The losses of one training, and what it did to the forget answers."""

    forget_loss: list[float] = field(default_factory=list)
    """The forget loss of each optimizer step."""
    retain_loss: list[float] = field(default_factory=list)
    """The retain loss of each optimizer step; zeros without a retain term."""
    probability_before: float = 0.0
    """Probability per answer token, exp(-mean NLL), in the first micro-batch of forget examples, before training."""
    probability_after: float = 0.0
    """The same after training."""

    def note(self) -> str:
        """The latest losses, for the progress line."""
        return f"forget loss {self.forget_loss[-1]:.3g}, retain loss {self.retain_loss[-1]:.3g}"


class Trainer:
    """Trains a model in place.

    Args:
        model: the model to train; already sharded if there are several processes.
        losses: the losses of the objective.
        training: the training plan.
        resources: precision, checkpoints and trackers on this machine.
        batches: the micro-batches of this process.
        reference: the reference model, for objectives that use its logits or hidden states. With LoRA, it may be the
            model itself; its adapters are then disabled for the reference.
        first_epoch: number of epochs completed in earlier rounds of the run.
        folder: folder for checkpoints. If it contains one, training resumes from it.
        name: name of this training, for progress lines and trackers.
        callback: called after every optimizer step.

    Raises:
        PlanError: options contradict each other, or transformers does not know the optimizer or scheduler.
    """

    def __init__(
        self,
        model: Any,
        losses: Losses,
        training: Training,
        resources: Resources,
        batches: MicroBatches,
        *,
        reference: Any | None = None,
        first_epoch: int = 0,
        folder: Path,
        name: str,
        callback: Callback | None = None,
    ) -> None:
        check_resources(training, resources)
        self._model, self._losses, self._training, self._resources = model, losses, training, resources
        self._objective, self._batches, self._reference = losses.objective, batches, reference
        self._first_epoch, self._folder, self._name = first_epoch, folder, name
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._parameters = list(trained.values())
        self._device = compute_device(self._parameters[0])
        self._optimizer, self._scheduler = make_optimizer(self._parameters, training, len(batches))
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=resources.precision == "float16")
        self._saved = Saved(trained, self._optimizer, {"scheduler": self._scheduler, "scaler": self._scaler})
        self._combination = COMBINATIONS[self._objective.combine](self._objective, self._parameters)
        self._sharpness = Sharpness(self._parameters, training.sam_radius)
        self._control: torch.Tensor | None = None
        self._callback = callback
        self._done = 0
        self.history = History()
        if reference is not None and reference is not model:
            reference.eval().requires_grad_(False)
        if resources.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def train(self) -> History:
        """Runs the remaining steps and returns the losses."""
        transformers.set_seed(self._training.seed)
        self._restore()
        tracker = self._tracker()
        self._model.train()
        with Progress(len(self._batches), self._name, shown=is_main()) as task:
            task.update(self._done)
            while self._done < len(self._batches):
                self._step()
                task.update(note=self.history.note())
                if tracker is not None:
                    tracker.log(self._log(), step=self._done)
                if self._callback is not None and is_main():
                    self._callback(self._done, self._log())
                if self._resources.save_every and self._done % self._resources.save_every == 0:
                    self._save()
        if tracker is not None:
            tracker.finish()
        self.history.probability_after = self._forget_probability()
        return self.history

    def _step(self) -> None:
        """One optimizer step."""
        batches = self._batches.step(self._done)
        forget = retain = 0.0
        self._sharpness.aim(lambda: self._forget_gradient(batches))
        for number, batch in enumerate(batches):
            forget_share, retain_share = self._backward(batch, last=number == len(batches) - 1)
            forget, retain = forget + forget_share, retain + retain_share
        self._scaler.unscale_(self._optimizer)
        if self._training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._training.max_grad_norm)
        self._combination.before_step(self._done)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._combination.after_step(self._scheduler, lambda: self._retain_loss(self._done))
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._done += 1
        self.history.forget_loss.append(total(forget, self._device))
        self.history.retain_loss.append(total(retain, self._device))
        epoch = self._first_epoch + self._done // (len(self._batches) // self._training.epochs)
        self._combination.finish(self.history.retain_loss[-1], epoch)

    def _backward(self, batch: Batch, last: bool) -> tuple[float, float]:
        """Runs both backward passes of a micro-batch one after the other, so that one set of activations is in memory.

        Returns:
            The micro-batch's contributions to the step's forget and retain loss.
        """
        batch = self._to_device(batch)
        with self._sharpness.perturbed():
            forget = self._add_gradient(self._loss(batch, "forget"), self._objective.gamma)
        if not self._objective.alpha:
            self._combination.after(last)
            return forget, 0.0
        self._combination.between()
        retain = self._add_gradient(self._loss(batch, "retain"), self._combination.alpha)
        self._combination.after(last)
        return forget, retain

    def _forget_gradient(self, batches: list[Batch]) -> None:
        """Adds the forget gradient of a whole step."""
        for batch in batches:
            self._add_gradient(self._loss(self._to_device(batch), "forget"), self._objective.gamma)

    def _add_gradient(self, loss: torch.Tensor, weight: float) -> float:
        """Adds the gradient of weight · loss and returns the loss."""
        torch.autograd.backward(self._scaler.scale(weight * loss))
        return float(loss.detach())

    def _loss(self, batch: Batch, side: str) -> torch.Tensor:
        """A micro-batch's contribution to the forget or retain loss of its step, a scalar."""
        losses, examples = self._losses, batch[side]
        needs = losses.needs if side == "forget" else losses.retain_needs
        layer = int(self._objective.parameters["layer"]) if "hidden" in needs else None
        with autocast(self._resources, self._device):
            outputs = forward(self._model, examples, layer)
            if needs & {"reference_logits", "reference_hidden"}:
                reference = self._under_reference(examples, layer)
                outputs |= {f"reference_{name}": value for name, value in reference.items()}
            if "reference_nll" in examples:
                outputs["reference_nll"] = examples["reference_nll"]
            if losses.alternates and side == "forget":
                alternate = {**batch["alternate"], "targets": batch["alternate"]["labels"][:, 1:]}
                if losses.alternate_passes:
                    alternate |= forward(self._model, alternate)
                outputs |= {f"alternate_{name}": value for name, value in alternate.items()}
            if "control" in needs:
                outputs["control"] = self._control_vector(outputs["hidden"])
            inputs = {name: outputs[name] for name in needs}
            values = losses.forget(**inputs) if side == "forget" else losses.retain(**inputs)
        if side == "forget" and self._done == 0 and not self.history.probability_before:
            self.history.probability_before = _probability(outputs)
        counted = outputs["targets"] != IGNORED
        if values.dim() == 1:
            values, divisor = values[counted.any(dim=1)], examples["step_examples"]
        else:
            divisor = examples["step_tokens"]
        share: torch.Tensor = values.sum() / divisor
        if "logits" not in needs:  # adds zero, so that every shard takes part in the backward pass
            share = share + 0.0 * outputs["logits"].float().sum()
        return share

    @torch.no_grad()
    def _under_reference(self, batch: Batch, layer: int | None) -> dict[str, torch.Tensor]:
        """The outputs of `forward` with the reference model."""
        if self._reference is not self._model:
            return forward(self._reference, batch, layer)
        model: Any = self._model
        training = model.training
        model.eval()
        trainable = {id(parameter) for parameter in self._parameters}
        with model.disable_adapter():
            outputs = forward(model, batch, layer)
        for parameter in model.parameters():  # peft also makes the fixed inner factors trainable again
            parameter.requires_grad_(id(parameter) in trainable)
        model.train(training)
        return outputs

    @torch.no_grad()
    def _retain_loss(self, step: int) -> float:
        """The retain loss of a step, at the current weights."""
        self._model.eval()
        loss = sum(float(self._loss(self._to_device(batch), "retain")) for batch in self._batches.step(step))
        self._model.train()
        return total(loss, self._device)

    @torch.no_grad()
    def _forget_probability(self) -> float:
        """The value of `History.probability_after`."""
        self._model.eval()
        with autocast(self._resources, self._device):
            return _probability(forward(self._model, self._to_device(self._batches.step(0)[0])["forget"]))

    def _control_vector(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._control is None:
            generator = torch.Generator().manual_seed(self._training.seed)
            vector = torch.rand(hidden.shape[-1], generator=generator)
            self._control = (vector / vector.norm()).to(hidden.device)
        return self._control

    def _to_device(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return {key: self._to_device(value) for key, value in batch.items()}
        return batch.to(self._device) if isinstance(batch, torch.Tensor) else batch

    def _tracker(self) -> Any | None:
        """The experiment tracker, or None if there is none on this process."""
        name, folder = self._resources.report_to, self._resources.log_dir
        if name == "none" or not is_main():
            return None
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        options = {"logging_dir": folder} if kind.requires_logging_directory else {}
        tracker = kind(self._name.replace(", ", "-").replace(" ", "-"), **options)
        tracker.start()
        logger.info("%s: logging losses to %s%s", self._name, name, f" in {folder}" if options else "")
        return tracker

    def _log(self) -> dict[str, float]:
        rate = self._optimizer.param_groups[0]["lr"]
        losses = {"forget_loss": self.history.forget_loss[-1], "retain_loss": self.history.retain_loss[-1]}
        return {**losses, "learning_rate": float(rate)}

    def _save(self) -> None:
        """Replaces the checkpoint atomically."""
        progress = {"done": self._done, "alpha": self._combination.alpha, "history": vars(self.history)}
        self._saved.save(self._folder, self._done, progress)

    def _restore(self) -> None:
        """Resumes from the checkpoint, if there is one."""
        progress = self._saved.restore(self._folder)
        if progress is None:
            return
        self._done, self._combination.alpha = progress["done"], progress["alpha"]
        self.history = History(**progress["history"])
        if is_main():
            logger.info("%s: resuming after step %d of %d", self._name, self._done, len(self._batches))


def autocast(resources: Resources, device: torch.device) -> torch.autocast:
    """A context manager for forward passes in the precision of `resources`; sharded layers need it, too."""
    dtype = FLOAT_DTYPES[resources.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_resources(training: Training, resources: Resources) -> None:
    """Rejects options that the training loop does not support, before anything is published or downloaded.

    Raises:
        PlanError: options contradict each other, or the experiment tracker is unknown or not installed.
        MissingPackageError: LoRA is asked for and its extra is not installed.
    """
    if resources.cpu_offload and processes() == 1:
        raise PlanError(
            "--cpu-offload: needs several processes; start with `torchrun --nproc-per-node N -m mpunlearn.cli`, or leave "
            "it out"
        )
    if training.resolved().combine == "normalized" and resources.precision == "float16":
        raise PlanError(
            f"--precision float16: not supported by {training.objective}, which divides by gradient norms; use bfloat16 "
            "or float32"
        )
    if training.resolved().combine == "collapsed" and processes() > 1:
        raise PlanError(
            f"--objective {training.objective}: not supported on several processes, which shard the gradients that it "
            "takes apart; train on one"
        )
    if training.lora_rank:
        needs("lora", "--lora-rank")
    if resources.report_to == "none":
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if resources.report_to not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(["none", *LOGGER_TYPE_TO_CLASS])
        raise PlanError(f"--report-to: expected one of {known}, found {resources.report_to}")
    if resources.report_to not in {str(tracker.value) for tracker in get_available_trackers()}:
        raise PlanError(f"--report-to {resources.report_to}: not installed; run `pip install {resources.report_to}`")


def _probability(outputs: dict[str, torch.Tensor]) -> float:
    """Probability per answer token, exp(-mean NLL)."""
    counted = int((outputs["targets"] != IGNORED).sum())
    nll = float(token_nll(outputs["logits"].detach(), outputs["targets"]).sum())
    return float(torch.tensor(-nll / max(1, counted)).exp())
