"""Puts sizes and rates together to what a run needs."""

import shutil
from dataclasses import replace
from pathlib import Path

from mpunlearn.checkpoint import COMPANIONS, Checkpoint
from mpunlearn.planning.measure import Rates, Work
from mpunlearn.planning.recommended import CLASSES, Recommendation, size_class
from mpunlearn.planning.report import Minutes, RunEstimate, SeveralProcesses, TrainingMemory
from mpunlearn.planning.sharded import several_processes
from mpunlearn.planning.sizes import Shapes, network_disk, run_disk
from mpunlearn.protocol.messages import MAX_INLINE_BYTES
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.stream import THREADS

PROGRAM_BYTES = 700_000_000
"""Memory of the program itself, if it was not measured."""


def estimate(
    source: Checkpoint,
    shapes: Shapes,
    perturbation: Perturbation,
    work: Work,
    rates: Rates | None,
    *,
    rounds: int,
    clients: int,
    processes: int,
    advice: Recommendation | None,
    file: Path,
) -> RunEstimate:
    """Puts sizes and rates together.

    Args:
        source: the model.
        shapes: its shapes.
        perturbation: how the copies are made.
        work: what the client does on a copy in one round.
        rates: how long its parts take; None if nothing was measured.
        rounds: number of rounds.
        clients: number of clients.
        processes: number of processes that train together.
        advice: the recommendation that was followed; None without one.
        file: where the options are written.
    """
    training, copies = work.training, perturbation.copies
    companions = sum(path.stat().st_size for name in COMPANIONS if (path := source.path / name).is_file())
    copy = shapes.copy_bytes(perturbation.publish_dtype) + companions
    update, references = shapes.update_bytes(training), work.losses.reference_model
    memory = _training_memory(shapes, work, rounds, 1)
    program = rates.program_bytes if rates is not None and rates.program_bytes else PROGRAM_BYTES
    over = network_disk(
        shapes, training, copies=copies, rounds=rounds, copy=copy, clients=clients, references=references
    )
    followed = "the program's defaults, or as given"
    if advice is not None:
        followed = f"recommended for {CLASSES[size_class(shapes.parameters)]} parameters by {advice.source}"
    return RunEstimate(
        checkpoint=str(source.path),
        family=str(source.config["model_type"]),
        layers=shapes.architecture.layers,
        parameters=shapes.parameters,
        trained=shapes.trained_entries(training),
        objective=training.objective,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        rounds=rounds,
        copies=copies,
        clients=clients,
        epochs=training.epochs,
        steps=len(work.steps),
        forget_examples=len(work.examples.forget),
        retain_examples=len(work.examples.retain),
        copy_bytes=copy,
        update_bytes=update,
        down_bytes=copies * copy,
        up_bytes=copies * update,
        needs_store=max(copy, update) > MAX_INLINE_BYTES,
        pass_memory=program + shapes.pass_bytes(copies, THREADS, perturbation.publish_dtype),
        training_memory=program + memory.total,
        training_parts=memory,
        several=_several(shapes, work, rounds, processes, program) if processes > 1 else None,
        disk=run_disk(shapes, training, copies=copies, rounds=rounds, copy=copy, references=references),
        server_disk=over.server,
        client_disk=over.client,
        free_disk=shutil.disk_usage(file.parent).free,
        minutes=None if rates is None else _minutes(rates, work, copies, rounds),
        advice=followed,
        source="" if advice is None else advice.source,
        note="" if advice is None else advice.note,
        config=str(file),
    )


def _micro_batch(work: Work, processes: int) -> int:
    """Examples of the largest micro-batch of a process."""
    share = -(-max(map(len, work.steps)) // processes)
    return min(work.resources.micro_batch_size or work.training.batch_size, share)


def _training_memory(shapes: Shapes, work: Work, rounds: int, processes: int) -> TrainingMemory:
    """The memory of the largest micro-batch. Its forget and retain side are in memory one after the other.

    With LoRA, the model without its adapters is the reference in round 1, but from round 2 on the copy of round 1 is.
    """
    size = _micro_batch(work, processes)
    forget, alternates = work.examples.forget, [answer for each in work.examples.alternates for answer in each]
    examples = [*forget, *work.examples.retain, *alternates]
    return shapes.training_bytes(
        work.training,
        examples=size * (2 if work.losses.alternate_passes else 1),
        tokens=max(len(example.input_ids) for example in examples),
        answer_tokens=max(example.tokens for example in examples),
        precision=work.resources.precision,
        checkpointing=work.resources.gradient_checkpointing,
        reference_model=work.losses.reference_model and not (work.training.lora_rank and rounds == 1),
    )


def _several(shapes: Shapes, work: Work, rounds: int, processes: int, program: int) -> SeveralProcesses:
    """What training on several processes needs, with the program."""
    needs = several_processes(
        shapes,
        work.training,
        _training_memory(shapes, work, rounds, processes),
        processes=processes,
        micro_batches=-(-max(map(len, work.steps)) // (_micro_batch(work, processes) * processes)),
        alternates=work.losses.alternate_passes,
        precision=work.resources.precision,
        cpu_offload=work.resources.cpu_offload,
    )
    return replace(needs, host=needs.host + program)


def _minutes(rates: Rates, work: Work, copies: int, rounds: int) -> Minutes:
    server = rounds * (rates.publish + rates.aggregate)
    loads = 2 if work.losses.reference_model else 1
    client = rounds * copies * (loads * rates.load + rates.setup + len(work.steps) * rates.step + rates.write)
    return Minutes(server / 60, (client + copies * rates.reference) / 60, rates.what)
