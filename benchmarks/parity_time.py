"""Times `mpunlearn` and OpenUnlearning on the same checkpoint and data; `parity.py --time` starts it.

Each program is one process with one thread that loads everything first and then does tasks when it is told to. The two take
turns, task by task, so that both see the same machine. What is counted is the processor time (user and system) and the
wall-clock time of a task:

    evaluation   tokenization, forward passes, generation, scores and their aggregation
    training     tokenization, likelihoods under the reference model, and all optimizer steps

Not counted are imports, loading of models and data sets, the construction of trainers, and writing. Both programs have the
batches, optimizer, schedule, precision and trained weights of the other; in an evaluation, each has its own default batch size.
Both train the same examples in the same order, so the weights that they end with can be compared, too.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpunlearn.client.batches import Examples, MicroBatches, optimizer_steps
from mpunlearn.client.objectives import Losses
from mpunlearn.client.resources import Resources
from mpunlearn.client.trainer import Trainer
from mpunlearn.evaluation import tofu
from mpunlearn.evaluation.metrics import rouge_l
from mpunlearn.evaluation.probe import generate, probe
from mpunlearn.evaluation.prompts import answer_text
from mpunlearn.evaluation.sets import read_sets
from mpunlearn.lm.examples import encode, encode_alternates
from mpunlearn.lm.model import load, load_model, nll, pad_id
from mpunlearn.lm.records import Record
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.plan import Training
from mpunlearn.tables import markdown
from parity_serve import serve

EVALUATION = ("likelihoods", "rouge", "membership", "suite")
"""Probabilities, truth ratios and memorization; generated answers; membership inference; all of it in one call."""
OBJECTIVES = ("grad-ascent", "grad-diff", "npo", "dpo", "simnpo", "undial", "satimp", "wga", "ce-u")
MAX_NEW_TOKENS, THEIR_BATCH = 200, 32
"""OpenUnlearning's defaults for TOFU."""
TRAINING: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "optimizer": "adamw_torch",
    "train": "all",
    "max_grad_norm": 1.0,
}


class Ours:
    """`mpunlearn`'s side of every task.

    Args:
        folder: the folder with the checkpoint `model` and the question sets.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model, self._tokenizer = load(folder / "model")
        self._sets = read_sets(str(folder), "", None, Data())

    def task(self, name: str) -> Callable[[], Any]:
        """What is timed; everything else is done when this is called."""
        if name in EVALUATION:
            tasks: dict[str, Callable[[], Any]] = {
                "likelihoods": partial(self._evaluate, texts=False, membership=False),
                "rouge": self._rouge,
                "membership": self._membership,
                "suite": partial(self._evaluate, max_new_tokens=MAX_NEW_TOKENS),
            }
            return tasks[name]
        return partial(self._train, name, load_model(self._folder / "model"))

    def _evaluate(self, **options: Any) -> dict[str, Any]:
        return tofu.summarize(tofu.measure(self._model, self._tokenizer, self._sets, **options))

    def _rouge(self) -> None:
        sets = [questions for name, questions in self._sets.items() if name != "holdout"]
        prompts = [prompt for questions in sets for prompt in questions.encoded(self._tokenizer).prompts]
        texts = generate(self._model, self._tokenizer, prompts, MAX_NEW_TOKENS, mask_pad=True)
        answers = [answer for questions in sets for answer in questions.answers]
        for answer, text in zip(answers, texts, strict=True):
            rouge_l(answer, text)

    def _membership(self) -> None:
        model, tokenizer, per_example = self._model, self._tokenizer, {}
        for name in ("forget", "holdout"):
            alone: list[list[str]] = [[] for _ in self._sets[name].wrong]  # only the answers are tokenized
            examples = replace(self._sets[name], wrong=alone).encoded(tokenizer).answers
            answers = probe(model, tokenizer, examples, mask_pad=True, moments=True)
            written = [answer_text(example, tokenizer) for example in examples]
            per_example[name] = tofu.membership_scores(model, tokenizer, examples, answers, written, None)
        for attack in per_example["forget"]:
            tofu.membership_auc(per_example, attack)

    def _train(self, objective: str, model: Any) -> dict[str, torch.Tensor]:
        """The trained weights."""
        training = Training(**{"objective": objective, **TRAINING})
        losses, size, tokenizer = Losses(training.resolved()), training.batch_size, self._tokenizer
        forget, retain = (records(self._folder, name) for name in ("forget", "retain"))
        encoded = encode(forget, tokenizer, 512)
        encoded = [example.skipping(losses.objective.skip_tokens) for example in encoded]
        kept = encode(retain, tokenizer, 512) if losses.objective.alpha else []
        alternates = encode_alternates(forget, tokenizer, 512) if losses.alternates else []
        forget_nll: list[float] = []
        alternate_nll: list[list[float]] = []
        if "reference_nll" in losses.needs:
            forget_nll = nll(model, encoded, size, tokenizer)
            flat = nll(model, [one for several in alternates for one in several], size, tokenizer)
            alternate_nll = [[value] for value in flat]
        picks = steps(len(encoded), len(kept))
        examples = Examples(encoded, kept, alternates, forget_nll, alternate_nll)
        batches = MicroBatches(picks, examples, size=size, pad=pad_id(tokenizer))
        reference = load_model(self._folder / "model") if losses.reference_model else None
        with tempfile.TemporaryDirectory() as folder:
            Trainer(
                model, losses, training, Resources(), batches, reference=reference, folder=Path(folder), name=objective
            ).train()
        return dict(model.state_dict())


def records(folder: Path, name: str) -> list[Record]:
    """The examples of a set, for training. The alternate answer is the first wrong one."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Record(row["question"], row["answer"], alternates=(row["perturbed_answer"][0],)) for row in rows]


def steps(forget: int, retain: int) -> Any:
    """The examples of every optimizer step."""
    plan = {"batch_size": TRAINING["batch_size"], "epochs": TRAINING["epochs"], "seed": 0, "round_number": 1}
    return optimizer_steps(forget, retain, **plan)


class Worker:
    """One program in a process of its own, with one thread."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._name = " ".join(command[:2])
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            command,
            env={**environment, **threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def seconds(self, task: str) -> dict[str, float]:
        """Does a task. Ends the benchmark if it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # if it has ended, there is no answer, either
            self._process.stdin.write(f"{task}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"{self._log.read()[-3000:]}\n{self._name}: failed on {task}")
        result: dict[str, float] = json.loads(line)
        return result

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(theirs: Worker, ours: Worker, tasks: list[str], repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Times every task in both programs in turn, after one run of each that does not count."""
    found = []
    for task in tasks:
        runs: list[tuple[dict[str, float], dict[str, float]]] = []
        for number in range(repeats + 1):
            pair = (theirs, ours) if number % 2 else (ours, theirs)  # who goes first changes, too
            first, second = (program.seconds(task) for program in pair)
            runs.append((first, second) if number % 2 else (second, first))
        entry: dict[str, Any] = {"task": task}
        for kind in ("cpu", "wall"):
            a, b = ([run[side][kind] for run in runs[1:]] for side in (0, 1))
            ratios = [y / x for x, y in zip(a, b, strict=True)]
            entry[kind] = {"theirs": statistics.median(a), "ours": statistics.median(b), "ratios": ratios}
        entry["update_difference"] = update_difference(folder, task)
        found.append(entry)
        print(line_of(entry), file=sys.stderr, flush=True)
    return found


def update_difference(folder: Path, task: str) -> float | None:
    """Norm of the difference of both updates, relative to the norm of theirs; None if the task trains nothing."""
    files = [folder / f"{program}-{task}.pt" for program in ("theirs", "ours")]
    if not all(file.is_file() for file in files):
        return None
    theirs, ours = (torch.load(file, weights_only=True) for file in files)
    start = load_model(folder / "model").state_dict()
    squares = [
        (float((ours[n] - theirs[n]).square().sum()), float((theirs[n] - w).square().sum())) for n, w in start.items()
    ]
    return float((sum(d for d, _ in squares) / sum(u for _, u in squares)) ** 0.5)


def line_of(entry: Mapping[str, Any]) -> list[str]:
    """The cells of one row of the table."""
    cpu, wall = entry["cpu"], entry["wall"]
    spread = f"{statistics.median(cpu['ratios']):.2f} ({min(cpu['ratios']):.2f}–{max(cpu['ratios']):.2f})"
    gap = entry["update_difference"]
    return [
        entry["task"],
        f"{cpu['theirs']:.1f}",
        f"{cpu['ours']:.1f}",
        spread,
        f"{statistics.median(wall['ratios']):.2f}",
        "" if gap is None else f"{gap:.0e}",
    ]


def table(found: list[dict[str, Any]]) -> str:
    """One row per task."""
    header = [
        "",
        "OpenUnlearning, CPU s",
        "mpunlearn, CPU s",
        "ratio (lowest–highest)",
        "ratio, wall clock",
        "updates differ by",
    ]
    return markdown(header, [line_of(entry) for entry in found])


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    serve(Ours(root).task, root, "ours")
