"""Local unlearning: one published copy in, one update out.

    Δ'_k = A(θ_k; D_f, D_r) - θ_k        (arXiv 2602.23798, section on local unlearning)

The algorithm A is any of `OBJECTIVES`, trained by `transformers.Trainer`. The reference model of NPO is the published copy of
round 1 with the same number, never the server's model: its log-likelihoods of the forget set are computed in round 1 and
kept in the client's own memory folder, so later rounds need neither that copy nor a second model.

An ordinary checkpoint works as well and gives a plain, noise-free update; no server will take that for one of its copies.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.client.dataset import Example, Record, batches, encode, examples_digest, read_records
from mpunlearn.client.objectives import OBJECTIVES, Objective
from mpunlearn.errors import CheckpointError, DataError, PlanError
from mpunlearn.files import new_directory, read_json, write_json
from mpunlearn.protocol.exchange import Card
from mpunlearn.protocol.plan import Training


def unlearn(
    copy: str | Path,
    *,
    forget: str | Path,
    out: str | Path,
    retain: str | Path | None = None,
    memory: str | Path | None = None,
    training: Training | None = None,
) -> Path:
    """Unlearns on one published copy and writes the update.

    Args:
        copy: a published copy (or an ordinary checkpoint).
        forget: JSON lines to forget.
        out: a new directory for the update.
        retain: JSON lines to keep; objectives with a retain term need them.
        memory: the client's own directory, where log-likelihoods under the copies of round 1 are kept. Objectives with a
            reference model need it from round 2 on.
        training: objective and hyper-parameters.

    Returns:
        `out`.

    Raises:
        CheckpointError: the copy cannot be read, or `out` exists or cannot be written.
        DataError: an example file cannot be read, or is missing.
        PlanError: an unknown objective, or a weight selection that selects nothing.
    """
    training = training or Training()
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another directory for the update, or remove this one")
    source = Checkpoint(copy)
    card = Card.of(source.config)
    task = check(training, forget, retain)

    from mpunlearn.client import trainer

    model, tokenizer = trainer.load(source.path)
    select(model, training.train)
    forget_examples = encode(task.forget, tokenizer, training.max_length)
    retain_examples = encode(task.retain, tokenizer, training.max_length)
    reference_nll = None
    if task.objective.reference:
        kept = _memory_file(memory, card)
        reference_nll = _recall(kept, card, forget_examples)
        if reference_nll is None:
            if card is not None and card.round > 1:
                raise DataError(
                    f"{training.objective} compares with the copy of round 1, and this is {card}: give the --memory "
                    "directory that round 1 was run with"
                )
            reference_nll = trainer.nll(model, forget_examples, training.batch_size, tokenizer)
            _remember(kept, card, forget_examples, reference_nll)
    plan = batches(
        len(forget_examples),
        len(retain_examples),
        batch_size=training.batch_size,
        epochs=training.epochs,
        seed=training.seed,
        round_number=card.round if card else 1,
    )
    trainer.train(model, tokenizer, task.objective, training, plan, forget_examples, retain_examples, reference_nll)
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = trainer.on_disk(model, trained)
    if missing := sorted(set(tensors) - set(source.tensors)):
        raise CheckpointError(f"{source.path}: has no tensor {missing[0]}, which its model trained; is it damaged?")
    import torch

    with new_directory(out) as folder:
        specs = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with TensorWriter(folder, specs, stem="update") as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor.cpu().float() - source.read(name).float())
        write_json(folder / "update.json", {"format": 1, **(card.entry() if card else {})})
    return out


@dataclass(frozen=True)
class Task:
    """What is to be unlearned, read and checked."""

    objective: Objective
    forget: list[Record]
    retain: list[Record]
    """Empty where the objective has no retain term."""


def check(training: Training, forget: str | Path, retain: str | Path | None) -> Task:
    """Everything that can be known to be wrong before a model is loaded.

    Raises:
        DataError: an example file cannot be read, or is missing.
        PlanError: an unknown objective or hyper-parameter, or a weight selection that is not a regular expression.
    """
    objective = resolve(training)
    try:
        re.compile(training.train)
    except re.error as error:
        expected = "expected blocks, all or a regular expression"
        raise PlanError(f"--train: {expected}, found {training.train!r} ({error})") from None
    if objective.alpha and retain is None:
        raise DataError(
            f"--objective {training.objective} has a retain term: give --retain, or --alpha 0 to go without"
        )
    return Task(objective, read_records(forget), read_records(retain) if retain is not None and objective.alpha else [])


def resolve(training: Training) -> Objective:
    """The objective with the hyper-parameters that the training overrides.

    Raises:
        PlanError: there is no objective of that name, or it has no such hyper-parameter.
    """
    if training.objective not in OBJECTIVES:
        raise PlanError(f"--objective: expected one of {', '.join(OBJECTIVES)}, found {training.objective}")
    objective = OBJECTIVES[training.objective]
    given = {key: getattr(training, key) for key in ("gamma", "alpha", "beta") if getattr(training, key) is not None}
    if "beta" in given and objective.beta is None:
        raise PlanError(f"--beta: {training.objective} has no such hyper-parameter")
    if given.get("beta") == 0:
        raise PlanError("--beta: expected a number above 0, found 0")
    return replace(objective, **given)


def select(model: Any, train: str) -> None:
    """Lets the selected weights of a model train, and no others.

    Args:
        train: "blocks" (the transformer layers'), "all", or a regular expression over the model's parameter names.

    Raises:
        PlanError: no parameter matches.
    """
    pattern = {"all": "", "blocks": r"\.(layers|h|blocks)\.\d+\."}.get(train, train)
    names = [name for name, _ in model.named_parameters()]
    selected = {name for name in names if re.search(pattern, name)}
    if not selected:
        raise PlanError(f"--train: no parameter matches {train!r}; the first is {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)


def _memory_file(memory: str | Path | None, card: Card | None) -> Path | None:
    return Path(memory) / f"copy-{card.copy}.json" if memory is not None and card is not None else None


def _recall(path: Path | None, card: Card | None, examples: list[Example]) -> list[float] | None:
    """The log-likelihoods kept for these examples and this copy's run, or None."""
    if path is None or card is None or not path.is_file():
        return None
    try:
        kept = read_json(path)
        same = kept["run"] == card.run and kept["examples"] == examples_digest(examples)
        values = [float(value) for value in kept["forget_nll"]]
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a memory of round 1 ({error}); restore it, or begin the run anew") from error
    if not same or len(values) != len(examples):
        raise DataError(
            f"{path}: belongs to another run, another forget set or another --max-length; give each run its own --memory"
        )
    return values


def _remember(path: Path | None, card: Card | None, examples: list[Example], reference_nll: list[float]) -> None:
    if path is None or card is None:
        return
    kept = {**asdict(card), "examples": examples_digest(examples), "forget_nll": reference_nll}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, kept, mode=0o600)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
