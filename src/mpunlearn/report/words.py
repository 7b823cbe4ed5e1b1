"""The sentences of a report: what was asked and done, what each side could learn, what is not proved, what metrics mean.

Every sentence holds for the given plan; whether it is private to the server decides which page may say it. Nothing here
reads a file or knows of HTML.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mpunlearn.report.data import THIS_RUN, ClientSide, ModelAudit, PublicPlan, ServerSide

LOW, HIGH, LIKE_RETRAINED = "should be low", "should be high", "should be as retrained"


@dataclass(frozen=True)
class Meaning:
    """What a metric means."""

    title: str
    goal: str
    """Where it should be after unlearning: `LOW`, `HIGH` or `LIKE_RETRAINED`."""


_SETS = {
    "forget": ("Forget", LOW),
    "retain": ("Retain", HIGH),
    "ra": ("Real authors", HIGH),
    "wf": ("World facts", HIGH),
}
_VALUES = {
    "Q_A_Prob": "probability of the right answer",
    "Q_A_Prob_normalised": "probability of the right answer among the options",
    "Q_A_ROUGE": "overlap of the generated answer (ROUGE-L)",
    "knowmem_ROUGE": "overlap of answers about the text (ROUGE-L)",
    "verbmem_ROUGE": "overlap of a verbatim continuation (ROUGE-L)",
}
_MEMBERSHIP = {
    "loss": "loss",
    "zlib": "loss against compressed size",
    "min_k": "least likely tokens",
    "min_k_plus_plus": "least likely tokens, standardized",
    "gradnorm": "gradient norm",
    "reference": "loss against the retrained model",
}
MEANINGS: Mapping[str, Meaning] = {
    **{
        f"{prefix}_{name}": Meaning(f"{what}: {text}", goal)
        for prefix, (what, goal) in _SETS.items()
        for name, text in _VALUES.items()
    },
    **{
        f"{prefix}_Truth_Ratio": Meaning(f"{what}: truth ratio", LIKE_RETRAINED if prefix == "forget" else HIGH)
        for prefix, (what, _) in _SETS.items()
    },
    "model_utility": Meaning("Model utility over all sets but forget", HIGH),
    "exact_memorization": Meaning("Forget: exact memorization", LIKE_RETRAINED),
    "extraction_strength": Meaning("Forget: extraction strength", LIKE_RETRAINED),
    "forget_quality": Meaning("Forget quality: p-value of “as retrained”", HIGH),
    "forget_Q_A_PARA_Prob": Meaning("Forget: probability of the paraphrased answers", LIKE_RETRAINED),
    "forget_Q_A_PARA_ROUGE": Meaning("Forget: ROUGE-L against the paraphrased answers", LIKE_RETRAINED),
    "forget_Q_A_WORST_ROUGE": Meaning("Forget: ROUGE-L, highest over several prompts", LIKE_RETRAINED),
    "forget_Truth_Ratio_prob_mean": Meaning("Forget: share of the right among right and wrong answers", LIKE_RETRAINED),
    "retain_Q_A_PARA_Prob": Meaning("Retain: probability of the paraphrased answers", HIGH),
    "forget_Q_A_gibberish": Meaning("Forget: probability that answers are fluent", HIGH),
    **{f"leak@{1 << n}": Meaning(f"Forget: one of {1 << n} sampled answers leaks", LIKE_RETRAINED) for n in range(9)},
    "UDS": Meaning("Unlearning depth: how much is gone from the hidden states", HIGH),
    "memorization_score": Meaning("Score: memorization", HIGH),
    "privacy_score": Meaning("Score: privacy", HIGH),
    "privacy_score_UDS": Meaning("Score: privacy, with unlearning depth", HIGH),
    "utility_score": Meaning("Score: utility relative to the original model", HIGH),
    "overall_score": Meaning("Score: overall", HIGH),
    "overall_score_UDS": Meaning("Score: overall, with unlearning depth", HIGH),
    "relearning_score": Meaning("Score: resists relearning", HIGH),
    "quantization_score": Meaning("Score: resists quantization", HIGH),
    "robustness_score": Meaning("Score: resists relearning and quantization", HIGH),
    "privleak": Meaning("PrivLeak: membership inference against retrained, in %", LIKE_RETRAINED),
    **{
        f"mia_{name}": Meaning(f"Membership inference by {text} (AUC)", LIKE_RETRAINED)
        for name, text in _MEMBERSHIP.items()
    },
}
"""Metric, by OpenUnlearning's name → what it means."""
PAIRS = (("forget_Q_A_Prob", "retain_Q_A_Prob"), ("forget_knowmem_ROUGE", "retain_knowmem_ROUGE"))
"""The metrics of the forget and the retain set that are shown over rounds, whichever are there."""
MEASURES = {
    "Prob": "probability of the right answers",
    "ROUGE": "overlap of answers with the right ones (ROUGE-L)",
}
"""How the metrics of `PAIRS` end → what they measure."""
SEPARATIONS = {
    "floor": "A given text was forgotten, from the models before and after alone",
    "membership": "A given text was forgotten, from the updates (ridge regression on gradients)",
    "cosine": "A given text was forgotten, from the updates (cosine with gradients)",
}
TOLD_FROM = {"reference": "other texts", "near": "texts on the same subjects", "decoys": "the decoys"}


def count(number: int, what: str, plural: str = "") -> str:
    """A number and a noun: 1 round, 2 rounds."""
    return f"{number:,} {what if number == 1 else plural or what + 's'}"


def shown(label: str, this_run: str = "this run") -> str:
    """The label of a model as it is shown."""
    return this_run if label == THIS_RUN else label


def measure(name: str) -> str:
    """What a metric of `PAIRS` measures."""
    return MEASURES[name.rpartition("_")[2]]


def asked() -> tuple[str, ...]:
    """What was asked, for both pages."""
    return (
        "The owner of some texts (the client) asked the owner of a language model (the server) that the model forget these "
        "texts, the forget set, and keep what else it knows.",
        "Neither was to show the other what it holds: the parameters stay with the server, the texts with the client.",
    )


def done(plan: PublicPlan, finished: bool, network: bool, clients: int = 1) -> tuple[str, ...]:
    """What was done, for both pages."""
    training, several = plan.training, plan.copies > 1 or clients > 1
    copies = "a changed copy" if plan.copies == 1 else f"{plan.copies} changed copies"
    who = "the client unlearned its texts" if clients == 1 else f"{clients} clients unlearned their texts"
    where = (
        "between separate programs that communicate over a network"
        if network
        else "with both parties in one program, so whoever ran it held the model and the texts"
    )
    rounds = count(plan.rounds, "round")
    return (
        f"The texts were unlearned in {rounds}, {where}."
        if finished
        else f"The run is not finished: there is no final model yet. It is to take {rounds}, {where}.",
        f"In each round the server published {copies} of its model; {who} on {'it' if plan.copies == 1 else 'them'} with the "
        f"objective {training.objective.upper()} ({count(training.epochs, 'pass', 'passes')} over the texts) and returned the "
        f"update{'s' if several else ''}; the server undid its changes and added "
        f"{'their average' if several else 'the update'} to its model.",
    )


def client_learns(side: ServerSide) -> tuple[str, ...]:
    """What the client could learn, for the server's page."""
    settings, sentences = side.perturbation, []
    if settings.common or side.stand_in:
        source = "a stand-in for the model" if side.stand_in else "the model plus secret noise that all copies share"
        sentences.append(f"The copies were made of {source}, which no average of copies removes.")
    elif settings.kappa == 0:
        rearranged = "" if settings.reparameterization == "none" else ", with its parameters rearranged"
        sentences.append(f"The copies carried no noise: each is the model itself{rearranged}.")
    elif side.plan.copies == 1:
        sentences.append("Each copy carried noise of its own and none that lasts: averaging over rounds weakens it.")
    else:
        sentences.append(
            "The copies shared no common noise: whoever holds all copies of a round can compute the parameters almost exactly."
        )
    if side.audit is not None:
        sentences.append(_audited(side.audit))
    sentences.append("A copy is a working model. It hides the parameters, and not what the model can do.")
    return tuple(sentences)


def _audited(audit: ModelAudit) -> str:
    error = min(score.error for score in audit.attacks.values())
    attacks, copies = count(len(audit.attacks), "attack"), count(audit.copies, "copy", "copies")
    return f"The best of {attacks} on {copies} left an error of {error:.1%} of the weights’ norm."


def server_learns() -> tuple[str, ...]:
    """What the server could learn, for both pages; the client's page adds numbers."""
    return (
        "The server saw each update, and never the texts.",
        "Whoever has the model before and after unlearning can test whether a given text was forgotten. No protocol prevents "
        "that. The updates can tell more, such as which words occur in the texts.",
    )


def parameters_hidden() -> tuple[str, ...]:
    """What the client could learn, for the client's page: nothing that only the server knows."""
    return (
        "The client held working copies of the model, which show what the model can do. How well they hide its parameters is "
        "for the server to measure.",
    )


def not_proved(measured: bool, retrained: bool) -> tuple[str, ...]:
    """What is not proved, for both pages."""
    sentences = []
    if measured:
        sentences.append(
            "Forgetting was measured on the questions of an evaluation. It does not show that no other question, or further "
            "training, brings a text back."
        )
    else:
        sentences.append(
            "Nobody has measured yet whether the texts were forgotten: there is no evaluation of this run."
        )
    if retrained:
        sentences.append(
            "The yardstick is a model retrained without the texts. Equal numbers do not make two models the same."
        )
    sentences.append("Attacks show what they found. A better attack may find more.")
    return tuple(sentences)


def learned_from(side: ClientSide) -> tuple[str, ...]:
    """The strongest result of the client's audit in a sentence; none without an audit."""
    if side.audit is None:
        return ()
    scores = {
        name: max((separation.auc for separation in groups.values()), default=0.5)
        for name, groups in side.audit.separations.items()
    }
    if not scores:
        return ()
    floor = f" (the models alone give {scores['floor']:.2f})" if "floor" in scores else ""
    best = max((auc for name, auc in scores.items() if name != "floor"), default=scores.get("floor", 0.5))
    return (
        f"Attacks by the client on its own updates told the forgotten texts from others with an AUC of {best:.2f}{floor}; 0.5 "
        "is chance and 1 certainty.",
    )
