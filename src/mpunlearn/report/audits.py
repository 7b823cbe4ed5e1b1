"""The sections on audits: what could leak, the number that was measured, and its bound.

An audit belongs to the party that made it: `model_audit` is for the server's page, `text_audit` for the client's.
"""

from mpunlearn.report import words
from mpunlearn.report.data import ModelAudit, TextAudit
from mpunlearn.report.parts import Cell, Column, Section, Table


def model_audit(audit: ModelAudit) -> Section:
    """What the copies disclose of the server's model."""
    best = min(audit.attacks, key=lambda name: audit.attacks[name].error)
    equal = max(score.equal_bfloat16 for score in audit.attacks.values())
    exposed = max(audit.attacks.values(), key=lambda score: score.exposed_bfloat16)
    floor = "none announced" if audit.floor is None else f"at least {audit.floor:.3f} for attacks that average copies"
    if audit.holds is not None and audit.floor is not None:
        floor += ": holds" if audit.holds else ": does not hold"
        if audit.holds and audit.attacks[best].error < audit.floor:
            floor += "; the best attack knows more than copies"
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
    attacked = f"{words.count(audit.copies, 'copy', 'copies')} of {words.count(audit.rounds, 'round')}"
    text = [
        f"{words.count(len(audit.attacks), 'attack')} on {attacked}. A bound holds for every attack of its kind; the other "
        "numbers are what the best attack reached."
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
        folded=(Table("Each attack", each, attacks),),
    )


def text_audit(audit: TextAudit) -> Section:
    """What the updates disclose of the client's texts."""
    rows = []
    for score, groups in audit.separations.items():
        for group, found in groups.items():
            title = words.SEPARATIONS.get(score, score)
            told = words.TOLD_FROM.get(group, group)
            bound = "1.00: cannot be prevented" if score == "floor" else "0.50 is chance, 1.00 certainty"
            note = f"told from {told}; {found.tpr:.0%} found at 1% false alarms"
            rows.append((Cell(title, note=note), Cell(f"{found.auc:.3f}", found.auc), Cell(bound)))
    if audit.tokens:
        label = max(audit.tokens, key=lambda name: audit.tokens[name].auc)
        leak = audit.tokens[label]
        note = f"most in {label}; {leak.precision:.0%} of the guesses right, by chance {leak.chance:.0%}"
        rows.append(
            (
                Cell("Words that only the forget set has (tokens, AUC)", note=note),
                Cell(f"{leak.auc:.3f}", leak.auc),
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
        f"{words.count(audit.updates, 'update')} attacked as the server could. The first line is what any model that forgot "
        "the texts gives away; the others are what the updates add.",
    )
    columns = (Column("leak"), Column("number", True), Column("bound"))
    return Section(
        "audit", "What the updates disclose of the texts", text, tables=(Table("Leaks of the texts", columns, rows),)
    )
