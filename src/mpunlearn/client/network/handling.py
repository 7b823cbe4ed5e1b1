"""What is done with a copy, in a process of its own (see `process`): examine it, train on it, audit the update.

Whatever goes wrong here is a refusal: with an invalid copy or plan, anything can fail anywhere. The server is told one of
a few fixed reasons, which depend on the copy and the plan, and the user is told the details. The one exception is a full
disk.
"""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.client.client import Client
from mpunlearn.client.network.auditing import UpdateAudit
from mpunlearn.client.network.pins import Pins, check_against_base, use_tokenizer_of
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.plausibility.examine import Texts, failures, measure
from mpunlearn.errors import (
    CheckpointError,
    MPUError,
    PlanError,
    RefusalError,
    UnloadableError,
    UnsupportedModelError,
)
from mpunlearn.files import write_bytes
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.plan import Training
from mpunlearn.schema import parse, read, write


class Handling:
    """Handles the copies of one run.

    Args:
        folder: the worker's own folder, WORK.
        policy: what a copy has to be.
        texts: the client's texts, for the examination.
        options: further arguments of `Client`.
        audit: audits updates; None without [audit].
        say: reports one line to the user.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        texts: Texts,
        options: Mapping[str, Any],
        audit: UpdateAudit | None,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._policy, self._texts, self._say = folder, policy, texts, say
        self._options, self._audit = options, audit
        self._client: Client | None = None

    def examine(self, copy: str, card: str, training: str) -> None:
        """Checks that a copy is a model of a supported family, the one that it should be, and plausible.

        Args:
            copy: directory of the copy.
            card: the card that the job announces, as JSON.
            training: the training plan, as JSON.

        Raises:
            RefusalError: it is not.
        """
        path = Path(copy)
        with self._refusing("the copy cannot be examined"):
            try:
                checkpoint = Checkpoint(path)
                Architecture.of(checkpoint).tensor_roles(checkpoint)
            except (CheckpointError, UnsupportedModelError) as error:
                reason = str(error).replace(str(path), "copy")
                raise RefusalError(f"the copy is not a checkpoint of a supported family: {reason}") from error
            expected = parse(Card, json.loads(card))
            if (found := Card.of(checkpoint.config)) != expected:
                raise RefusalError(f"the copy's card ({found}) does not match the job")
            base, pins = self._identify(path)
            limits, max_length = self._policy.plausibility, parse(Training, json.loads(training)).max_length
            failed = failures(list(measure(path, self._texts, limits, max_length, base)), limits)
            for reasons in failed.values():
                self._say(f"the copy is not plausible: {reasons[0]}" + (" …" if len(reasons) > 1 else ""))
            if failed:
                raise RefusalError(f"the copy is not plausible: {', '.join(failed)}")
            if self._policy.model is None and not self._remembered.exists():
                write(self._remembered, pins)

    @property
    def _remembered(self) -> Path:
        """The file with the pins of the first copy."""
        return self._folder / "model.json"

    def _identify(self, copy: Path) -> tuple[Path | None, Pins]:
        """Checks that a copy is the model of the policy, or that of the first copy.

        Returns:
            The directory of the base, if the policy names one, and the copy's pins.
        """
        model, pins = self._policy.model, Pins.of(copy)
        base = model.base_folder() if model is not None else None
        if base is not None:
            differences = check_against_base(copy, base)
            use_tokenizer_of(base, copy)
            pins = Pins.of(copy)
        else:
            differences = []
        differences += self._pinned(pins).differences(pins)
        for difference in differences:
            self._say(f"not the model of the policy: {difference}")
        if differences:
            raise RefusalError("the copy is not of the model that the client expects")
        return base, pins

    def _pinned(self, pins: Pins) -> Pins:
        """What a copy has to be: as the policy says, or like the first copy; that may be this one."""
        if self._policy.model is not None:
            return self._policy.model
        if self._remembered.exists():
            return read(Pins, self._remembered)
        self._say(
            "no [model] in the policy: this copy's tokenizer and template are trusted, and later copies must have the same; "
            "`mpunlearn client review` shows what they are"
        )
        return pins

    def train(self, copy: str, update: str, training: str) -> None:
        """Unlearns on a copy.

        Args:
            copy: directory of the copy.
            update: where to write the update.
            training: the training plan, as JSON.

        Raises:
            RefusalError: the plan cannot be followed, or training fails.
        """
        with self._refusing("training on the copy failed"):
            plan = parse(Training, json.loads(training))
            if self._client is None or self._client.training != plan:
                self._client = Client(memory=self._folder / "memory", training=plan, **self._options)
            self._client.unlearn(Path(copy), Path(update))

    def audit(self, copy: str, update: str, max_length: str) -> None:
        """Audits an update.

        Args:
            copy: directory of the copy.
            update: directory of the update.
            max_length: maximum number of tokens in a text, as in training.

        Raises:
            RefusalError: it cannot be audited.
        """
        assert self._audit is not None
        with self._refusing("the update cannot be audited"):
            self._audit.measure(Path(update).name, Path(copy), Path(update), int(max_length))

    @contextmanager
    def _refusing(self, reason: str) -> Iterator[None]:
        """Turns whatever fails in the block into a refusal.

        Args:
            reason: what the server is told.
        """
        try:
            yield
        except RefusalError:
            raise
        except UnloadableError as error:
            self._say(str(error))
            raise RefusalError("transformers cannot load the copy") from error
        except PlanError as error:
            self._say(f"the plan cannot be followed: {error}")
            raise RefusalError("the plan cannot be followed with this client's text") from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._client = None
            self._say(f"{reason}: it needs more memory than the policy allows (process: memory_gigabytes)")
            raise RefusalError("handling the copy takes more memory than the client's policy allows") from error
        except OSError:
            raise
        except MPUError as error:
            if isinstance(error.__cause__, OSError):
                raise
            self._say(str(error))
            raise RefusalError(reason) from error
        except Exception as error:
            self._client = None
            write_bytes(self._folder / "error.txt", traceback.format_exc().encode(errors="replace"))
            self._say(f"{reason}: {type(error).__name__}; see {self._folder / 'error.txt'}")
            raise RefusalError(reason) from error
