"""Local unlearning: one published copy in, one update out.

    Δ'_k = A(θ_k; D_f, D_r) - θ_k        (arXiv 2602.23798, section on local unlearning)

The algorithm A is any of `OBJECTIVES`, trained by `transformers.Trainer`. The reference model of NPO is the published copy of
round 1 with the same number, never the server's model: its log-likelihoods of the forget set are computed in round 1 and
kept in the client's own memory folder, so later rounds need neither that copy nor a second model.

An ordinary checkpoint works as well and gives a plain, noise-free update; no server will take that for one of its copies.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpunlearn.architecture import FAMILIES
from mpunlearn.architecture.spaces import architecture_of
from mpunlearn.checkpoint import Checkpoint, TensorWriter, new_directory, write_json
from mpunlearn.client.dataset import Record, batches, encode, read_records, records_digest
from mpunlearn.client.objectives import OBJECTIVES, Objective
from mpunlearn.errors import CheckpointError, DataError, PlanError
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
    objective = resolve(training)
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name another directory for the update, or remove this one")
    source = Checkpoint(copy)
    card = Card.of(source.config)
    names = trained_names(source, training.train)
    forget_records = read_records(forget)
    if objective.alpha and retain is None:
        raise DataError(
            f"--objective {training.objective} has a retain term: give --retain, or --alpha 0 to go without"
        )
    retain_records = read_records(retain) if retain is not None and objective.alpha else []

    from mpunlearn.client import trainer

    model, tokenizer = trainer.load(source.path, names)
    forget_examples = encode(forget_records, tokenizer, training.max_length)
    retain_examples = encode(retain_records, tokenizer, training.max_length)
    reference_nll = None
    if objective.reference:
        kept = _memory_file(memory, card)
        reference_nll = _recall(kept, card, forget_records)
        if reference_nll is None:
            if card is not None and card.round > 1:
                raise DataError(
                    f"{training.objective} compares with the copy of round 1, and this is {card}: give the --memory "
                    "directory that round 1 was run with"
                )
            reference_nll = trainer.nll(model, forget_examples, training.batch_size, tokenizer)
            _remember(kept, card, forget_records, reference_nll)
    plan = batches(
        len(forget_examples),
        len(retain_examples),
        batch_size=training.batch_size,
        epochs=training.epochs,
        seed=training.seed,
        round_number=card.round if card else 1,
    )
    trainer.train(model, tokenizer, objective, training, plan, forget_examples, retain_examples, reference_nll)
    import torch

    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    with new_directory(out) as folder:
        specs = {name: (torch.float32, tuple(parameter.shape)) for name, parameter in parameters.items()}
        with TensorWriter(folder, specs, stem="update") as writer:
            for name, parameter in parameters.items():
                writer.write(name, parameter.detach().cpu().float() - source.read(name).float())
        write_json(folder / "update.json", {"format": 1, **(card.entry() if card else {})})
    return out


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


def trained_names(source: Checkpoint, train: str) -> set[str]:
    """Names of the tensors that train.

    Raises:
        UnsupportedModelError: "blocks" was asked of a family without a table.
        PlanError: not a regular expression, or one that no tensor matches.
    """
    if train == "all":
        return set(source.tensors)
    if train == "blocks":
        places = architecture_of(source, FAMILIES).places(source)
        return {name for name, place in places.items() if place.layer is not None}
    try:
        names = {name for name in source.tensors if re.search(train, name)}
    except re.error as error:
        raise PlanError(f"--train: expected blocks, all or a regular expression, found {train!r} ({error})") from None
    if not names:
        raise PlanError(f"--train: no tensor of {source.path} matches {train!r}, the first is {min(source.tensors)}")
    return names


def _memory_file(memory: str | Path | None, card: Card | None) -> Path | None:
    return Path(memory) / f"copy-{card.copy}.json" if memory is not None and card is not None else None


def _recall(path: Path | None, card: Card | None, records: list[Record]) -> list[float] | None:
    """The log-likelihoods kept for these examples and this copy's run, or None."""
    if path is None or card is None or not path.is_file():
        return None
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kept["run"] != card.run or kept["examples"] != records_digest(records):
        raise DataError(
            f"{path}: belongs to another run or another forget set; give each run its own --memory and the same --forget"
        )
    return [float(value) for value in kept["forget_nll"]]


def _remember(path: Path | None, card: Card | None, records: list[Record], reference_nll: list[float]) -> None:
    if path is None or card is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = {**asdict(card), "examples": records_digest(records), "forget_nll": reference_nll}
    write_json(path, kept, mode=0o600)
