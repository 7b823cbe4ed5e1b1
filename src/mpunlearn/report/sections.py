"""The sections of a page: figures and tables of what was measured. A section without data is None."""

from collections.abc import Iterable, Sequence

from mpunlearn.report import words
from mpunlearn.report.data import (
    ORIGINAL,
    RETRAINED,
    THIS_RUN,
    Answer,
    Evaluation,
    Losses,
    PublicPlan,
    RecordSummary,
    ServerSide,
)
from mpunlearn.report.parts import Cell, Column, Event, Figure, Line, Quote, Section, Table


def present(*sections: Section | None) -> tuple[Section, ...]:
    """The sections that have data."""
    return tuple(section for section in sections if section is not None)


def single(evaluations: Iterable[Evaluation]) -> dict[str, Evaluation]:
    """The models of a table: the original first, then others, the run's, and the retrained one last."""
    by_label = {item.label: item for item in evaluations if item.round is None}
    ends = {ORIGINAL: -1, THIS_RUN: 1, RETRAINED: 2}
    return {label: by_label[label] for label in sorted(by_label, key=lambda label: ends.get(label, 0))}


def over_rounds(evaluations: Sequence[Evaluation], plan: PublicPlan | None) -> Section | None:
    """The forget and the retain set after each round, as figures and as a table."""
    series = _series(evaluations, plan)
    pair = next((pair for pair in words.PAIRS if any(pair[0] in item.metrics for item in evaluations)), None)
    if not series or pair is None:
        return None
    retrained = single(evaluations).get(RETRAINED)
    figures, rows = [], []
    for name, what in zip(pair, ("forget", "retain"), strict=True):
        lines = tuple(
            Line(label, tuple((number, metrics[name]) for number, metrics in points if name in metrics), style)
            for style, (label, points) in enumerate(series.items())
        )
        lines = tuple(line for line in lines if line.points)
        value = retrained.metrics.get(name) if retrained is not None else None
        if not lines:
            continue
        title = f"{'Texts to forget' if what == 'forget' else 'Texts to keep'}, by round"
        figures.append(
            Figure(
                title,
                _in_words(lines, value),
                "rounds",
                words.measure(name),
                lines,
                None if value is None else (RETRAINED, value),
            )
        )
        rows += [
            (
                Cell(line.label),
                Cell(what),
                *(_number(dict(line.points).get(number)) for number in _numbers(series)),
            )
            for line in lines
        ]
    if not rows:
        return None
    columns = (Column("model"), Column("set"), *(Column(f"round {number:g}", True) for number in _numbers(series)))
    table = Table("The figures as a table", columns, rows)
    text = (
        "What the models still know after each round. For the texts to forget it should fall to the level of the retrained "
        "model, which never saw them; for the texts to keep it should stay.",
    )
    return Section("rounds", "Over the rounds", text, tuple(figures), folded=(table,))


Series = dict[str, list[tuple[float, dict[str, float]]]]


def _series(evaluations: Sequence[Evaluation], plan: PublicPlan | None) -> Series:
    """Label → the metrics by round, of the labels that were evaluated over rounds; the run itself first.

    The original model is round 0 of each, and the run's model the last round of the run.
    """
    models = single(evaluations)
    labels = dict.fromkeys(item.label for item in evaluations if item.round is not None)
    found: Series = {}
    for label in sorted(labels, key=lambda label: label != THIS_RUN):
        points = {item.round: item.metrics for item in evaluations if item.label == label and item.round is not None}
        if ORIGINAL in models:
            points.setdefault(0, models[ORIGINAL].metrics)
        if label == THIS_RUN and THIS_RUN in models and plan is not None:
            points.setdefault(plan.rounds, models[THIS_RUN].metrics)
        found[words.shown(label, "MPU, this run")] = sorted(
            ((float(number), metrics) for number, metrics in points.items()), key=lambda point: point[0]
        )
    return found


def _numbers(series: Series) -> list[float]:
    return sorted({number for points in series.values() for number, _ in points})


def _in_words(lines: Sequence[Line], retrained: float | None) -> str:
    parts = [
        f"{line.label}: from {line.points[0][1]:.3f} (round {line.points[0][0]:g}) to {line.points[-1][1]:.3f} "
        f"(round {line.points[-1][0]:g})"
        for line in lines
    ]
    return "; ".join([*parts, *([] if retrained is None else [f"retrained model: {retrained:.3f}"])]) + "."


def metrics(evaluations: Sequence[Evaluation]) -> Section | None:
    """Every metric of every model, the retrained one last."""
    models = single(evaluations)
    names = dict.fromkeys(name for item in models.values() for name in item.metrics)
    if not names:
        return None
    rows = []
    for name in names:
        meaning = words.MEANINGS.get(name)
        first = Cell(name) if meaning is None else Cell(meaning.title, note=f"{name} · {meaning.goal}")
        rows.append((first, *(_number(item.metrics.get(name)) for item in models.values())))
    columns = (Column("metric"), *(Column(words.shown(label), True) for label in models))
    text = "Every metric says where it should be after unlearning."
    if RETRAINED in models:
        text += " The retrained model never saw the texts to forget: it is what unlearning should come close to."
    return Section("metrics", "All metrics", (text,), tables=(Table("Metrics by model", columns, rows),))


def trained(losses: Sequence[Losses]) -> Section | None:
    """The probability of the forget answers while the client trained."""
    if not losses:
        return None
    points: list[tuple[float, float]] = []
    rows = []
    for number in sorted({item.round for item in losses}):
        copies = [item for item in losses if item.round == number]
        before, after = (
            sum(getattr(item, name) for item in copies) / len(copies)
            for name in ("probability_before", "probability_after")
        )
        points += [(number - 1.0, before), (float(number), after)]
        rows.append((Cell(f"round {number}", number), *(_number(value) for value in (before, after))))
    line = Line("on the copies", tuple(points), 0)
    copies_of = len({item.copy for item in losses})
    about = "; ".join(f"{row[0].text}: from {row[1].text} to {row[2].text}" for row in rows) + "."
    figure = Figure("Texts to forget, in training", about, "rounds", "probability of the forget answers", (line,))
    mean = "" if copies_of == 1 else f", mean of {copies_of} copies"
    text = (
        f"The probability of the forget answers before and after each round's training, as the client saw it{mean}. A new "
        "round begins on new copies, which can know a little more or less.",
    )
    table = Table("Training by round", (Column("round", True), Column("before", True), Column("after", True)), rows)
    return Section("training", "While training", text, (figure,), folded=(table,))


def answers(found: Sequence[Answer]) -> Section | None:
    """Sample answers before and after."""
    if not found:
        return None
    quotes = tuple(
        Quote(
            {"forget": "to forget", "retain": "to keep"}.get(answer.set, answer.set),
            answer.question,
            (
                ("expected", answer.expected),
                ("before", answer.before),
                ("after", answer.after),
                *(() if answer.retrained is None else (("retrained", answer.retrained),)),
            ),
        )
        for answer in found
    )
    text = (
        "Some questions, and what the models answer. For the texts to forget, a wrong answer after unlearning is what was "
        "wanted.",
    )
    return Section("answers", "Sample answers", text, quotes=quotes)


def record_of(record: RecordSummary | None) -> Section | None:
    """The record's number, its verification and its events."""
    if record is None:
        return None
    verdict = "Signatures and hashes were checked and are right." if record.valid else "The check of the record failed."
    facts = (("Number", record.number), ("Verification", "valid" if record.valid else "not valid"))
    events = tuple(Event(time, text) for time, text in record.events)
    return Section("record", "Record", (verdict, *record.problems), events=events, facts=facts)


def details(plan: PublicPlan | None, more: Iterable[tuple[str, str]]) -> Section | None:
    """The settings that both parties know, and more."""
    facts: list[tuple[str, str]] = []
    if plan is not None:
        training = plan.training
        facts = [
            ("Rounds", str(plan.rounds)),
            ("Copies per round", str(plan.copies)),
            ("Objective", training.objective),
            ("Passes over the texts per round", str(training.epochs)),
            ("Learning rate", f"{training.learning_rate:g}"),
            ("Batch size", str(training.batch_size)),
            ("Optimizer", training.optimizer),
            ("Trained weights", training.train),
            *([("LoRA rank", str(training.lora_rank))] if training.lora_rank else []),
        ]
    facts += more
    return Section("details", "Settings", facts=tuple(facts)) if facts else None


def perturbation_facts(side: ServerSide) -> list[tuple[str, str]]:
    """The settings that only the server knows."""
    settings = side.perturbation
    common = settings.common_noise if isinstance(settings.common_noise, str) else f"{settings.common_noise:g}"
    return [
        ("Step size of the server", f"{side.eta:g}"),
        ("Noise that cancels, κ", f"{settings.kappa:g}"),
        ("Noise relative to", "the task vector" if side.base else "the weights"),
        ("Common noise", "none" if not settings.common else common),
        ("Reparameterization", settings.reparameterization),
        ("Denoising", settings.denoising),
    ]


def _number(value: float | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell(f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}", value)
