"""Turns the two sides of a run into pages: which numbers, tables and figures there are, and what is said about them.

A part without data is left out. What both pages share is written once; what is private to one party is only in the function
of that party's page.
"""

from collections.abc import Iterable, Sequence

from mpunlearn.report import words
from mpunlearn.report.data import (
    ORIGINAL,
    RETRAINED,
    THIS_RUN,
    ClientSide,
    Evaluation,
    Losses,
    ModelAudit,
    PublicPlan,
    RecordSummary,
    ServerSide,
    TextAudit,
)
from mpunlearn.report.parts import Card, Cell, Column, Event, Figure, Line, Mark, Page, Quote, Section, Table


def server_page(side: ServerSide, record: RecordSummary | None) -> Page:
    """The server's page. It has no example text, because `ServerSide` has none."""
    audit = side.audit
    return Page(
        party="server",
        title="Unlearning report",
        lead="For the owner of the model. This page contains none of the texts.",
        facts=(("Model", side.model), *_plan_facts(side.plan, record)),
        cards=(*_cards(side.evaluations), *(() if audit is None else (_audit_card(audit),))),
        answers=_summary(
            side.plan,
            side.finished,
            side.network,
            side.evaluations,
            client=words.client_learns(side),
            server=words.server_learns(),
        ),
        sections=_sections(
            _over_rounds(side.evaluations),
            _metrics(side.evaluations),
            None if audit is None else _model_audit(audit),
            _record(record),
            _details(side.plan, _perturbation_facts(side)),
        ),
    )


def client_page(side: ClientSide, record: RecordSummary | None) -> Page:
    """The client's page, with sample answers if there are any."""
    return Page(
        party="client",
        title="Unlearning report",
        lead="For the owner of the texts."
        + (" This page quotes some of them: keep it as confidential as the texts." if side.answers else ""),
        facts=_plan_facts(side.plan, record),
        cards=(*_cards(side.evaluations), *_client_audit_card(side.audit)),
        answers=_summary(
            side.plan,
            side.finished,
            side.network,
            side.evaluations,
            client=words.parameters_hidden(),
            server=(*words.server_learns(), *words.learned_from(side)),
        ),
        sections=_sections(
            _over_rounds(side.evaluations),
            _answers(side),
            _metrics(side.evaluations),
            _trained(side.losses),
            None if side.audit is None else _text_audit(side.audit),
            _record(record),
            _details(side.plan, [(f"SHA-256, {name} set", digest) for name, digest in side.digests.items()]),
        ),
    )


def _sections(*sections: Section | None) -> tuple[Section, ...]:
    return tuple(section for section in sections if section is not None)


def _plan_facts(plan: PublicPlan | None, record: RecordSummary | None) -> tuple[tuple[str, str], ...]:
    facts = [] if record is None else [("Record", record.number)]
    if plan is not None:
        facts += [("Rounds", str(plan.rounds)), ("Copies per round", str(plan.copies))]
    return tuple(facts)


def _summary(
    plan: PublicPlan | None,
    finished: bool,
    network: bool,
    evaluations: Sequence[Evaluation],
    client: tuple[str, ...],
    server: tuple[str, ...],
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    measured = [item for item in evaluations if item.label not in (ORIGINAL, RETRAINED)]
    retrained = any(item.label == RETRAINED for item in evaluations)
    parts = [
        ("What was asked", words.asked()),
        ("What was done", words.done(plan, finished, network) if plan is not None else ()),
        ("What the server could learn", server),
        ("What the client could learn", client),
        ("What is not proved", words.not_proved(bool(measured), retrained)),
    ]
    return tuple((title, sentences) for title, sentences in parts if sentences)


def _single(evaluations: Iterable[Evaluation]) -> dict[str, Evaluation]:
    """The models of a table: the original first, then others, the run's, and the retrained one last."""
    by_label = {item.label: item for item in evaluations if item.round is None}
    ends = {ORIGINAL: -1, THIS_RUN: 1, RETRAINED: 2}
    return {label: by_label[label] for label in sorted(by_label, key=lambda label: ends.get(label, 0))}


def _subject(models: dict[str, Evaluation]) -> Evaluation | None:
    """The model that the report is about: the run's, or the only one that was unlearned."""
    others = [label for label in models if label not in (ORIGINAL, RETRAINED)]
    return models[THIS_RUN] if THIS_RUN in models else models[others[0]] if len(others) == 1 else None


def _cards(evaluations: Sequence[Evaluation]) -> list[Card]:
    models = _single(evaluations)
    subject = _subject(models)
    cards = []
    for pair in words.PAIRS:
        if subject is None or pair[0] not in subject.metrics:
            continue
        for name, title, note in zip(
            pair,
            ("Texts to forget", "Texts to keep"),
            ("Should fall to the level of the retrained model.", "Should stay high."),
            strict=True,
        ):
            if name in subject.metrics:
                cards.append(_card(models, subject, name, title, note))
        break
    return cards


def _card(models: dict[str, Evaluation], subject: Evaluation, name: str, title: str, note: str) -> Card:
    marks = [
        Mark(text, models[label].metrics[name], kind, f"{models[label].metrics[name]:.3f}")
        for label, text, kind in (
            (ORIGINAL, "before", "before"),
            (subject.label, "after", "after"),
            (RETRAINED, "retrained", "retrained"),
        )
        if label in models and name in models[label].metrics
    ]
    what = "ROUGE-L" if name.endswith("ROUGE") else "Probability"
    number = "" if subject.examples is None or "retain" in name else f" {words.count(subject.examples, 'question')}."
    return Card(title, f"{subject.metrics[name]:.3f}", f"{what} of the right answers.{number} {note}", tuple(marks))


def _audit_card(audit: ModelAudit) -> Card:
    error = min(score.error for score in audit.attacks.values())
    marks = [Mark("best attack", error, "after", f"{error:.3f}")]
    if audit.floor is not None:
        marks.append(Mark("announced", audit.floor, "bound", f"{audit.floor:.3f}"))
    return Card(
        "Parameters hidden", f"{error:.1%}", "Error left to a client that pools its copies. 0 % is the model.", tuple(marks)
    )


def _client_audit_card(audit: TextAudit | None) -> list[Card]:
    if audit is None or not audit.separations:
        return []
    aucs = {
        name: max(item.auc for item in groups.values()) for name, groups in audit.separations.items() if groups
    }
    added = [auc for name, auc in aucs.items() if name != "floor"]
    if not added:
        return []
    marks = [Mark("updates", max(added), "after", f"{max(added):.2f}")]
    if "floor" in aucs:
        marks.append(Mark("models alone", aucs["floor"], "bound", f"{aucs['floor']:.2f}"))
    marks.append(Mark("chance", 0.5, "before", "0.50"))
    note = "How well the updates tell the texts from others (AUC)."
    return [Card("Texts recognizable", f"{max(added):.2f}", note, tuple(marks))]


def _over_rounds(evaluations: Sequence[Evaluation]) -> Section | None:
    series = _series(evaluations)
    pair = next((pair for pair in words.PAIRS if any(pair[0] in item.metrics for item in evaluations)), None)
    if not series or pair is None:
        return None
    retrained = _single(evaluations).get(RETRAINED)
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
                "probability of the right answers",
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
    columns = (Column("model"), Column("set"), *(Column(f"round {number:g}", True) for number in _numbers(series)))
    table = Table("The figures as a table", columns, rows)
    text = (
        "The probability of the right answers after each round. Left, it should fall to the level of the retrained model, which "
        "never saw the texts; right, it should stay.",
    )
    return Section("rounds", "Over the rounds", text, tuple(figures), hidden_tables=(table,))


Series = dict[str, list[tuple[float, dict[str, float]]]]


def _series(evaluations: Sequence[Evaluation]) -> Series:
    """Label → the metrics by round, of the labels that were evaluated over rounds; the run itself first."""
    models = _single(evaluations)
    labels = dict.fromkeys(item.label for item in evaluations if item.round is not None)
    found: Series = {}
    for label in sorted(labels, key=lambda label: label != THIS_RUN):
        points = {item.round: item.metrics for item in evaluations if item.label == label and item.round is not None}
        if ORIGINAL in models:
            points.setdefault(0, models[ORIGINAL].metrics)
        found["MPU, this run" if label == THIS_RUN else label] = sorted(
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


def _metrics(evaluations: Sequence[Evaluation]) -> Section | None:
    models = _single(evaluations)
    names = dict.fromkeys(name for item in models.values() for name in item.metrics)
    if not names:
        return None
    rows = []
    for name in names:
        meaning = words.MEANINGS.get(name)
        first = Cell(name) if meaning is None else Cell(meaning.title, note=name)
        rows.append((first, Cell(words.goal(name)), *(_number(item.metrics.get(name)) for item in models.values())))
    columns = (Column("metric"), Column("goal"), *(Column(label, True) for label in models))
    text = ["Goal says where a value should be after unlearning: low, high, or as that of the retrained model."]
    if RETRAINED in models:
        text.append("The retrained model never saw the texts.")
    return Section("metrics", "All metrics", (" ".join(text),), tables=(Table("Metrics by model", columns, rows),))


def _model_audit(audit: ModelAudit) -> Section:
    best = min(audit.attacks, key=lambda name: audit.attacks[name].error)
    equal = max(score.equal_bfloat16 for score in audit.attacks.values())
    exposed = max(audit.attacks.values(), key=lambda score: score.exposed_bfloat16)
    floor = "none announced" if audit.floor is None else f"at least {audit.floor:.3f} for attacks that average copies"
    if audit.holds is not None:
        floor += ": holds" if audit.holds else ": does not hold"
    rows = [
        (
            Cell("Error of the parameters, relative to their norm", note=f"best attack: {best}"),
            Cell(f"{audit.attacks[best].error:.3f}", audit.attacks[best].error),
            Cell(floor),
        ),
        (Cell("Share of weights restored exactly, in bfloat16"), Cell(f"{equal:.1%}", equal), Cell("none")),
        (
            Cell("The same in the most exposed matrix", note=exposed.exposed),
            Cell(f"{exposed.exposed_bfloat16:.1%}", exposed.exposed_bfloat16),
            Cell("none"),
        ),
    ]
    if audit.behaviors:
        probability = max(item.probability for item in audit.behaviors.values())
        rows.append(
            (
                Cell("Probability of the right answers with a copy"),
                Cell(f"{probability:.3f}", probability),
                Cell("cannot be hidden: a copy is a working model"),
            )
        )
    scores = {**audit.attacks, **audit.baselines}
    attacks = [
        (
            Cell(name),
            Cell(f"{score.error:.2g}", score.error),
            Cell(f"{score.equal_bfloat16:.1%}", score.equal_bfloat16),
            Cell(f"{score.equal_float32:.1%}", score.equal_float32),
        )
        for name, score in scores.items()
    ]
    text = [
        f"{words.count(len(audit.attacks), 'attack')} on {words.count(audit.copies, 'copy', 'copies')} of "
        f"{words.count(audit.rounds, 'round')}. A bound holds for every attack of its kind; the other numbers are what the best "
        "attack reached."
    ]
    if not audit.trusted:
        text.append("The control failed: the copies are not those of this run, so these numbers cannot be trusted.")
    columns = (Column("leak"), Column("number", True), Column("bound"))
    each = (Column("attack"), Column("error", True), Column("equal, bfloat16", True), Column("equal, float32", True))
    return Section(
        "audit",
        "What the copies disclose of the model",
        tuple(text),
        tables=(Table("Leaks of the model", columns, rows),),
        hidden_tables=(Table("Each attack", each, attacks),),
    )


def _text_audit(audit: TextAudit) -> Section:
    rows = []
    for score, groups in audit.separations.items():
        for group, found in groups.items():
            title = words.SEPARATIONS.get(score, score)
            told = words.TOLD_FROM.get(group, group)
            bound = "1.00: cannot be prevented" if score == "floor" else "0.50 is chance, 1.00 certainty"
            note = f"told from {told}; {found.tpr:.0%} found at 1 % false alarms"
            rows.append((Cell(title, note=note), Cell(f"{found.auc:.3f}", found.auc), Cell(bound)))
    if audit.tokens:
        label = max(audit.tokens, key=lambda name: audit.tokens[name].auc)
        found = audit.tokens[label]
        note = f"most in {label}; {found.precision:.0%} of the guesses right, by chance {found.chance:.0%}"
        rows.append(
            (
                Cell("Words that only the forget set has (tokens, AUC)", note=note),
                Cell(f"{found.auc:.3f}", found.auc),
                Cell("0.50 is chance, 1.00 certainty"),
            )
        )
    if audit.spelling:
        layer = max(audit.spelling, key=lambda item: item.exact)
        rows.append(
            (
                Cell("Texts spelled out token by token (share of positions)", note=f"most in {layer.label}"),
                Cell(f"{layer.exact:.3f}", layer.exact),
                Cell("0 is nothing, 1 every token"),
            )
        )
    text = (
        f"{words.count(audit.updates, 'update')} attacked as the server could. The first line is what any model that forgot the "
        "texts gives away; the others are what the updates add.",
    )
    columns = (Column("leak"), Column("number", True), Column("bound"))
    return Section(
        "audit", "What the updates disclose of the texts", text, tables=(Table("Leaks of the texts", columns, rows),)
    )


def _trained(losses: Sequence[Losses]) -> Section | None:
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
    figure = Figure(
        "Texts to forget, in training", about, "rounds", "probability of the forget answers", (line,)
    )
    mean = "" if copies_of == 1 else f", mean of {copies_of} copies"
    text = (
        f"The probability of the forget answers before and after each round's training, as the client saw it{mean}. A new "
        "round begins on new copies, which can know a little more or less.",
    )
    table = Table("Training by round", (Column("round", True), Column("before", True), Column("after", True)), rows)
    return Section("training", "While training", text, (figure,), hidden_tables=(table,))


def _answers(side: ClientSide) -> Section | None:
    if not side.answers:
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
        for answer in side.answers
    )
    text = ("Some questions, and what the models answer. A wrong answer after unlearning is what was wanted for the first ones.",)
    return Section("answers", "Sample answers", text, quotes=quotes)


def _record(record: RecordSummary | None) -> Section | None:
    if record is None:
        return None
    verdict = "Signatures and hashes were checked and are right." if record.valid else "The check of the record failed."
    facts = (("Number", record.number), ("Verification", "valid" if record.valid else "not valid"))
    events = tuple(Event(time, text) for time, text in record.events)
    return Section("record", "Record", (verdict, *record.problems), events=events, facts=facts)


def _details(plan: PublicPlan | None, more: Iterable[tuple[str, str]]) -> Section | None:
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


def _perturbation_facts(side: ServerSide) -> list[tuple[str, str]]:
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
