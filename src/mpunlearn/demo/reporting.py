"""What the demos measure for the report of their run, in the files that `report` finds.

The metrics of every model, the probability of the right answers after each round, and, in the client's folder only, a few
answers of the models. Over the rounds only the right answers are measured, without paraphrases, wrong answers and generated
text, so that a round takes a fraction of a second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpunlearn.demo.models import TrainedWorld
from mpunlearn.demo.table import MAX_NEW_TOKENS, sets_of
from mpunlearn.evaluation import tofu
from mpunlearn.evaluation.evaluate import Evaluation
from mpunlearn.evaluation.probe import generate, prompt_of
from mpunlearn.files import write_json
from mpunlearn.lm.model import load

SAMPLES = {"forget": 4, "retain": 2}
"""Number of sample answers from each set."""


def write_metrics(run: Path, label: str, metrics: Mapping[str, float]) -> None:
    """Writes the metrics of a model as RUN/evaluations/LABEL.json, in the format of `evaluate --out`."""
    evaluation = Evaluation(dict(metrics), None, {}, {}, {})
    write_json(run / "evaluations" / f"{label}.json", evaluation.to_json())


def write_rounds(run: Path, label: str, world: TrainedWorld, models: Sequence[Path]) -> None:
    """Measures the models after rounds 1, 2 and so on, and writes RUN/evaluations/LABEL@ROUND.json for each."""
    sets = {
        name: replace(questions, paraphrases=questions.answers, wrong=[[] for _ in questions.answers])
        for name, questions in sets_of(world).items()
    }
    for number, checkpoint in enumerate(models, start=1):
        found = tofu.summarize(tofu.measure(*load(checkpoint), sets, texts=False, membership=False))
        write_metrics(run, f"{label}@{number}", {f"{name}_Q_A_Prob": found[f"{name}_Q_A_Prob"] for name in sets})


def write_answers(client: Path, world: TrainedWorld, after: Path) -> None:
    """Writes a few questions of the forget and the retain set with the models' answers as CLIENT/answers.json."""
    sets = sets_of(world)
    chosen = [(name, place) for name, number in SAMPLES.items() for place in _spread(len(sets[name]), number)]
    answers: list[dict[str, Any]] = [
        {"set": name, "question": sets[name].questions[place], "expected": sets[name].answers[place]}
        for name, place in chosen
    ]
    for key, checkpoint in (("before", world.original), ("after", after), ("retrained", world.retrained)):
        model, tokenizer = load(checkpoint)
        encoded = {name: questions.encoded(tokenizer).answers for name, questions in sets.items()}
        prompts = [prompt_of(encoded[name][place]) for name, place in chosen]
        for answer, text in zip(answers, generate(model, tokenizer, prompts, MAX_NEW_TOKENS), strict=True):
            answer[key] = text.strip()
    write_json(client / "answers.json", {"answers": answers, "format": 1}, 0o600)


def _spread(length: int, number: int) -> list[int]:
    """Up to `number` places in a list, far apart and not at a fixed distance, as the same questions recur."""
    return sorted({min(length - 1, index * length // number + index) for index in range(number)})
