"""Turns the two sides of a run into pages: which numbers, tables and figures there are, and what is said about them.

A part without data is left out. What both pages share is written once; what is private to one party is only in the function
of that party's page.
"""

from collections.abc import Sequence

from mpunlearn.report import words
from mpunlearn.report.audits import model_audit, text_audit
from mpunlearn.report.data import (
    ORIGINAL,
    RETRAINED,
    THIS_RUN,
    ClientSide,
    Evaluation,
    ModelAudit,
    PublicPlan,
    RecordSummary,
    ServerSide,
    TextAudit,
)
from mpunlearn.report.parts import Card, Mark, Page
from mpunlearn.report.sections import (
    answers,
    details,
    metrics,
    over_rounds,
    perturbation_facts,
    present,
    record_of,
    single,
    trained,
)


def server_page(side: ServerSide, record: RecordSummary | None) -> Page:
    """The server's page. It has no example text, because `ServerSide` has none."""
    audit = side.audit
    return Page(
        party="server",
        title="Unlearning report",
        lead="For the owner of the model. This page contains none of the texts.",
        facts=(
            ("Model", side.model),
            *_plan_facts(side.plan, record),
            *((("Clients", str(side.clients)),) if side.clients > 1 else ()),
        ),
        cards=(*_cards(side.evaluations), *(() if audit is None else (_audit_card(audit),))),
        answers=_summary(
            side.evaluations,
            done=words.done(side.plan, side.finished, side.network, side.clients),
            client=words.client_learns(side),
            server=words.server_learns(),
        ),
        sections=present(
            over_rounds(side.evaluations, side.plan),
            metrics(side.evaluations),
            None if audit is None else model_audit(audit),
            record_of(record),
            details(side.plan, perturbation_facts(side)),
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
            side.evaluations,
            done=() if side.plan is None else words.done(side.plan, side.finished, side.network),
            client=words.parameters_hidden(),
            server=(*words.server_learns(), *words.learned_from(side)),
        ),
        sections=present(
            over_rounds(side.evaluations, side.plan),
            answers(side.answers),
            metrics(side.evaluations),
            trained(side.losses),
            None if side.audit is None else text_audit(side.audit),
            record_of(record),
            details(side.plan, [(f"SHA-256, {name} set", digest) for name, digest in side.digests.items()]),
        ),
    )


def _plan_facts(plan: PublicPlan | None, record: RecordSummary | None) -> tuple[tuple[str, str], ...]:
    facts = [] if record is None else [("Record", record.number)]
    if plan is not None:
        facts += [("Rounds", str(plan.rounds)), ("Copies per round", str(plan.copies))]
    return tuple(facts)


def _summary(
    evaluations: Sequence[Evaluation],
    done: tuple[str, ...],
    client: tuple[str, ...],
    server: tuple[str, ...],
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    labels = {item.label for item in evaluations}
    parts = [
        ("What was asked", words.asked()),
        ("What was done", done),
        ("What the server could learn", server),
        ("What the client could learn", client),
        ("What is not proved", words.not_proved(THIS_RUN in labels, RETRAINED in labels)),
    ]
    return tuple((title, sentences) for title, sentences in parts if sentences)


def _cards(evaluations: Sequence[Evaluation]) -> list[Card]:
    models = single(evaluations)
    subject = models.get(THIS_RUN)
    cards = []
    for pair in words.PAIRS:
        if subject is None or pair[0] not in subject.metrics:
            continue
        for name, title, note in zip(
            pair,
            ("Still known of the texts to forget", "Still known of the texts to keep"),
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
    what = words.measure(name)
    number = "" if subject.examples is None or "retain" in name else f" {words.count(subject.examples, 'question')}."
    return Card(title, f"{subject.metrics[name]:.3f}", f"{what[0].upper()}{what[1:]}.{number} {note}", tuple(marks))


def _audit_card(audit: ModelAudit) -> Card:
    error = min(score.error for score in audit.attacks.values())
    marks = [Mark("best attack", error, "after", f"{error:.3f}")]
    if audit.floor is not None:
        marks.append(Mark("announced", audit.floor, "bound", f"{audit.floor:.3f}"))
    return Card(
        "Error of the best attack",
        f"{error:.1%}",
        "Distance of a client's best estimate from the parameters, relative to their norm. At 0% it has the model.",
        tuple(marks),
    )


def _client_audit_card(audit: TextAudit | None) -> list[Card]:
    if audit is None or not audit.separations:
        return []
    aucs = {name: max(item.auc for item in groups.values()) for name, groups in audit.separations.items() if groups}
    added = [auc for name, auc in aucs.items() if name != "floor"]
    if not added:
        return []
    marks = [Mark("updates", max(added), "after", f"{max(added):.2f}")]
    if "floor" in aucs:
        marks.append(Mark("models alone", aucs["floor"], "bound", f"{aucs['floor']:.2f}"))
    marks.append(Mark("chance", 0.5, "before", "0.50"))
    note = "How well the updates tell the texts from others (AUC)."
    return [Card("Texts recognizable", f"{max(added):.2f}", note, tuple(marks))]
