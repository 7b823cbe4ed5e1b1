"""Trains a small Llama on real TOFU authors and unlearns two of them through the command line.

One model is trained from scratch on forget01 (2 authors, 40 questions) and the first authors of retain99 until it knows
them, and a second one on the retain authors only. `mpunlearn run` then unlearns forget01 with NPO and three copies and,
with the same budget, without noise and with a single noisy copy. Prints the same table as `mpunlearn demo` and writes
result.json.

    python benchmarks/tofu_small.py --tofu DIRECTORY_WITH_TOFU_JSON_FILES [--out DIR]

The TOFU benchmark (Maini et al., arXiv 2401.06121) is not part of this repository.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from mpunlearn.demo import models
from mpunlearn.demo.table import Line, measure, table
from mpunlearn.demo.world import Recipe
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.records import Record

QUESTIONS_PER_AUTHOR = 20
RECIPE = Recipe(vocabulary=4000, hidden=128, ffn=344, epochs=20, learning_rate=3e-3)
HYPER_PARAMETERS = "--objective npo --learning-rate 1e-3 --batch-size 8 --gamma 0.1"
ARMS = {
    "noise-free unlearning": "--copies 1 --kappa 0 --common-noise 0 --reparameterization none",
    "single noisy copy": "--copies 1 --kappa 0.1 --common-noise 0",
    "MPU, 3 copies": "--copies 3 --kappa 0.1 --common-noise 0",
}


def read(path: Path, count: int | None = None) -> list[Record]:
    """The first `count` questions of a TOFU file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [Record(row["question"], row["answer"]) for row in rows]


def write(path: Path, records: list[Record]) -> Path:
    """Writes examples in the file format of mpunlearn."""
    lines = [json.dumps({"question": record.question, "answer": record.answer}) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def questions(records: list[Record]) -> Questions:
    """Records as an evaluation set without paraphrases and wrong answers."""
    answers = [record.answer for record in records]
    return Questions([str(record.question) for record in records], answers, answers, [[] for _ in records])


def tofu_small(
    tofu: Path, out: Path, *, forget_authors: int, retain_authors: int, recipe: Recipe, rounds: int = 5
) -> list[Line]:
    """Trains, unlearns through the command line, and evaluates; returns the lines of the table."""
    forget = read(tofu / "forget01.json", forget_authors * QUESTIONS_PER_AUTHOR)
    retain = read(tofu / "retain99.json", retain_authors * QUESTIONS_PER_AUTHOR)
    files = {"forget": write(out / "forget.jsonl", forget), "retain": write(out / "retain.jsonl", retain)}
    texts = [text for record in forget + retain for text in (str(record.question), record.answer)]
    tokenizer = models.train_tokenizer(texts, recipe.vocabulary)

    sets = {"forget": questions(forget), "retain": questions(retain)}

    def measured(name: str, checkpoint: Path, seconds: float | None = None) -> Line:
        return measure(name, checkpoint, sets, None, seconds, max_new_tokens=120)

    torch.manual_seed(0)
    models.save(models.new_llama(tokenizer, recipe), tokenizer, out / "untrained")
    original, retrained = out / "original", out / "retrained"
    models.train_side_by_side({original: forget + retain, retrained: retain}, out / "untrained", recipe, seed=0)
    lines = [measured("original", original), measured("retrained", retrained)]
    for number, (name, options) in enumerate(ARMS.items()):
        command = [sys.executable, "-m", "mpunlearn.cli", "run", str(original), "--out", str(out / f"run-{number}")]
        command += ["--forget", str(files["forget"]), "--retain", str(files["retain"]), "--rounds", str(rounds)]
        begin = time.monotonic()
        subprocess.run([*command, *options.split(), *HYPER_PARAMETERS.split()], check=True, stdout=subprocess.DEVNULL)
        lines.append(measured(name, out / f"run-{number}" / "final", time.monotonic() - begin))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True, help="directory with forget01.json and retain99.json")
    parser.add_argument("--out", type=Path, help="directory for models and result.json (default: temporary)")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        lines = tofu_small(arguments.tofu, out, forget_authors=2, retain_authors=18, recipe=RECIPE)
        (out / "result.json").write_text(json.dumps([asdict(line) for line in lines], indent=2), encoding="utf-8")
    print(table(lines))
    print(f"{time.monotonic() - begin:.0f} s in total")


if __name__ == "__main__":
    main()
