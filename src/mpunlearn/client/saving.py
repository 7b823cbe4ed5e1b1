"""Checkpoints of a training that is in progress, from which it resumes, also with another number of processes.

    FOLDER/step-00000012/            the state after 12 steps
        *.distcp, .metadata          weights and the optimizer's state, as `torch.distributed.checkpoint` writes them: each
                                     process writes its shard, and reads what its new shard needs
        training.pt                  numbers of the optimizer, scheduler, scaler, losses
        random-RANK.pt               the random state of each process

A checkpoint appears under its name when all processes have written it, and then replaces the one before. A process that is
killed at any time therefore leaves a complete one.

Not covered: the random states of another number of processes. Each process then continues with the state that the seed
gives, so that dropout differs from that of an uninterrupted training.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from mpunlearn.errors import CheckpointError, PlanError
from mpunlearn.lm.processes import is_main, new_directory_together, processes, rank

OLDER = "checkpoint.pt"
"""The file that older versions wrote. It is not read."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What is saved besides numbers that the training loop itself keeps.

    Args:
        parameters: the trained parameters by name; sharded if there are several processes.
        optimizer: their optimizer.
        others: what has a `state_dict`, by name: scheduler and scaler.
    """

    parameters: Mapping[str, torch.Tensor]
    optimizer: Any
    others: Mapping[str, Any]

    def save(self, folder: Path, step: int, progress: Mapping[str, Any]) -> None:
        """Replaces the checkpoint. All processes must call this.

        Args:
            folder: the folder for checkpoints.
            step: number of optimizer steps taken.
            progress: what the training loop keeps: numbers, and lists and dicts of numbers.

        Raises:
            FileError: it cannot be written.
            PlanError: the optimizer's state cannot be divided among other processes.
        """
        before = _complete(folder)
        tensors, numbers = self._optimizer_state()
        state = {
            "progress": dict(progress),
            "processes": processes(),
            "tensors": {key: tensor.dtype for key, tensor in tensors.items()},
            "numbers": numbers,
            "groups": [_without(group, "params") for group in self.optimizer.param_groups],
            "others": {name: other.state_dict() for name, other in self.others.items()},
        }
        with new_directory_together(folder / f"step-{step:08d}", mode=0o700) as partial:
            with _quiet():
                state_dict_saver.save({**_detached(self.parameters), **tensors}, checkpoint_id=partial)
            torch.save(_random_state(), partial / f"random-{rank()}.pt")
            if is_main():
                torch.save(state, partial / "training.pt")
        if is_main():
            (folder / OLDER).unlink(missing_ok=True)
            for older in before:
                shutil.rmtree(older, ignore_errors=True)

    def restore(self, folder: Path) -> dict[str, Any] | None:
        """Restores the latest checkpoint. All processes must call this.

        Returns:
            What was given to `save` as `progress`; None if there is no checkpoint.

        Raises:
            CheckpointError: a checkpoint is damaged.
        """
        found = _complete(folder)
        if not found:
            if is_main() and (folder / OLDER).is_file():
                logger.warning("%s: written by an older version; this training starts over", folder / OLDER)
            return None
        try:
            return self._restore(found[-1])
        except (OSError, RuntimeError, KeyError, ValueError, EOFError, CheckpointException) as error:
            raise CheckpointError(
                f"{folder}: the checkpoint of the interrupted training cannot be read: {error}; remove this directory to "
                "start from the beginning"
            ) from error

    def _restore(self, place: Path) -> dict[str, Any]:
        state = torch.load(place / "training.pt", map_location="cpu", weights_only=True)
        by_key = {
            key: torch.empty_like(self.parameters[key.split("/")[1]].detach(), dtype=dtype)
            for key, dtype in state["tensors"].items()
        }
        with _quiet():
            state_dict_loader.load({**_detached(self.parameters), **by_key}, checkpoint_id=place)
        values: dict[str, dict[str, Any]] = {}
        for key, value in {**state["numbers"], **by_key}.items():
            _, name, entry = key.split("/")
            values.setdefault(name, {})[entry] = value
        for name, entries in values.items():
            self.optimizer.state[self.parameters[name]] = entries
        for group, kept in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update(kept)
        for name, other in self.others.items():
            other.load_state_dict(state["others"][name])
        if state["processes"] == processes():
            _set_random_state(torch.load(place / f"random-{rank()}.pt", weights_only=True))
        progress: dict[str, Any] = state["progress"]
        return progress

    def _optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The optimizer's state: tensors that have the shape of their parameter, and everything else.

        Raises:
            PlanError: there are several processes, and another tensor has entries of this process's shard only.
        """
        tensors, numbers = {}, {}
        for name, parameter in self.parameters.items():
            for entry, value in self.optimizer.state.get(parameter, {}).items():
                key = f"optimizer/{name}/{entry}"
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim():
                    tensors[key] = value
                elif isinstance(value, torch.Tensor) and value.dim() and processes() > 1:
                    raise PlanError(
                        f"--save-every: on several processes, the state {entry} of --optimizer "
                        f"{type(self.optimizer).__name__} cannot be saved; use adamw_torch or tensor_adam, or leave it out"
                    )
                else:
                    numbers[key] = value
        return tensors, numbers


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder contains a checkpoint."""
    return bool(_complete(folder))


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints; the latest is the last one."""
    return sorted(folder.glob("step-*"))


def _detached(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"parameters/{name}": parameter.detach() for name, parameter in parameters.items()}


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
