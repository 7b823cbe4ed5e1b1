"""What the demos measure for the report of their run, in the files that `report` finds.

The metrics of every model, the probability of the right answers after each round, and, in the client's folder only, a few
answers of the models. Over the rounds only the right answers are measured, without paraphrases, wrong answers and generated
text, so that a round takes a fraction of a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpunlearn.demo.models import TrainedWorld
from mpunlearn.demo.table import MAX_NEW_TOKENS, sets_of
from mpunlearn.evaluation import tofu
from mpunlearn.evaluation.evaluate import Evaluation
from mpunlearn.evaluation.probe import generate
from mpunlearn.evaluation.sets import Questions
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
    sets = {name: _picked(questions, range(len(questions))) for name, questions in sets_of(world).items()}
    for number, checkpoint in enumerate(models, start=1):
        found = tofu.summarize(tofu.measure(*load(checkpoint), sets, texts=False, membership=False))
        write_metrics(run, f"{label}@{number}", {f"{name}_Q_A_Prob": found[f"{name}_Q_A_Prob"] for name in sets})


def write_answers(client: Path, world: TrainedWorld, after: Path) -> None:
    """Writes a few questions of the forget and the retain set with the models' answers as CLIENT/answers.json."""
    chosen = {
        name: _picked(questions, _spread(len(questions), SAMPLES[name])) for name, questions in sets_of(world).items()
    }
    answers: list[dict[str, Any]] = [
        {"set": name, "question": question, "expected": answer}
        for name, questions in chosen.items()
        for question, answer in zip(questions.questions, questions.answers, strict=True)
    ]
    for key, checkpoint in (("before", world.original), ("after", after), ("retrained", world.retrained)):
        model, tokenizer = load(checkpoint)
        prompts = [prompt for questions in chosen.values() for prompt in questions.encoded(tokenizer).prompts]
        for answer, text in zip(answers, generate(model, tokenizer, prompts, MAX_NEW_TOKENS), strict=True):
            answer[key] = text.strip()
    write_json(client / "answers.json", {"answers": answers, "format": 1}, 0o600)


def _picked(questions: Questions, places: Sequence[int]) -> Questions:
    """Some of the questions, without paraphrases and wrong answers."""
    answers = [questions.answers[place] for place in places]
    return Questions([questions.questions[place] for place in places], answers, answers, [[] for _ in places])


def _spread(length: int, number: int) -> list[int]:
    """Up to `number` places in a list, far apart and not at a fixed distance, as the same questions recur."""
    return sorted({min(length - 1, index * length // number + index) for index in range(number)})
