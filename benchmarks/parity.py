"""Compares `mpunlearn evaluate` with OpenUnlearning's own evaluation, metric by metric.

Trains a small model that knows every second question of the forget set, so that no metric is at its limit, and one that
knows none, for each of three formats of the prompt: a chat template that ends in the end token, one that goes on after it
and has a system prompt and a date, and no template. Both programs evaluate the same checkpoints on the same questions, in
TOFU's format, and on a few texts in MUSE's. Prints one table per format, and one of all.

    python benchmarks/parity.py --openunlearning DIR [--tofu DIR] [--python PATH] [--questions N] [--out FILE]
    python benchmarks/parity.py … --time REPEATS [--tasks TASK …]

The second form has the same options, and compares how long both programs take (see `parity_time.py`).

DIR is a checkout of github.com/locuslab/open-unlearning, of which nothing is in this repository. Its metrics run in a
process of their own, with the Python of `--python`, which needs their requirements: torch, transformers, datasets, scipy,
scikit-learn, rouge-score, omegaconf, and accelerate for `mia_reference`. Without `--tofu` the questions are those of the demo.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import parity_time
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.evaluation.definitions import DEFINITIONS
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.lm.records import Record, in_chat
from mpunlearn.lm.sources import Data
from mpunlearn.tables import markdown

Rows = dict[str, list[dict[str, Any]]]
COLUMNS = ("question", "answer", "paraphrased_answer", "perturbed_answer")
FILES = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
    "holdout": "retain99",
}
"""Set → TOFU's file. Any questions that no model was trained on will do as a holdout set."""
RECIPE = Recipe(vocabulary=2000, hidden=64, ffn=172, learning_rate=3e-3)
EPOCHS, BATCH = 30, 8
TIMED_RECIPE = Recipe(vocabulary=8000, hidden=256, layers=4, heads=4, groups=2, ffn=688, learning_rate=1e-3)
"""Of the model that is timed: 5.0 million parameters, 41 % of them in the output layer, which is also the embedding (in Qwen2.5
0.5B, 28 %)."""
TIMED_EPOCHS = 20
NEW_TOKENS = 40
CHATML = (
    "{{ '<|user|>Today is ' + date_string + '<|end|>\\n' }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Format:
    """How questions are put to a model."""

    template: str | None
    system_prompt: str | None = None
    date: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of `evaluate`."""
        kwargs = None if self.date is None else {"date_string": self.date}
        return {"system_prompt": self.system_prompt, "template_kwargs": kwargs}

    @property
    def theirs(self) -> dict[str, Any]:
        """OpenUnlearning's `template_args`."""
        if self.template is None:
            tags = {"user_start_tag": "Question: ", "user_end_tag": "\n", "asst_start_tag": "Answer: "}
            return {"apply_chat_template": False, "asst_end_tag": "\n\n", **tags}
        return {"apply_chat_template": True, "system_prompt": self.system_prompt, "date_string": self.date}


FORMATS = {
    "template that ends in the end token": Format(models.CHAT_TEMPLATE),
    "template that goes on after it, system prompt and date": Format(CHATML, "Be brief.", "10 Apr 2025"),
    "no template": Format(None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openunlearning", type=Path, required=True, help="checkout of OpenUnlearning")
    parser.add_argument("--tofu", type=Path, help="directory with TOFU's JSON files (default: questions of the demo)")
    parser.add_argument("--python", default=sys.executable, help="Python with OpenUnlearning's requirements")
    parser.add_argument("--questions", type=int, default=20, help="questions per set")
    parser.add_argument("--out", type=Path, help="JSON file for all values")
    parser.add_argument(
        "--time", type=int, default=0, metavar="REPEATS", help="time both programs this many times instead"
    )
    parser.add_argument("--tasks", nargs="*", help="what to time (default: everything)")
    arguments = parser.parse_args()
    source = arguments.openunlearning / "src"
    if not (source / "evals" / "metrics" / "memorization.py").is_file():
        parser.exit(
            2,
            f"--openunlearning {arguments.openunlearning}: expected a checkout of OpenUnlearning, found no "
            "src/evals/metrics/memorization.py; run `git clone https://github.com/locuslab/open-unlearning` and give its "
            "directory\n",
        )
    if arguments.time:
        found = timed(arguments.tofu, arguments.questions, source, arguments.python, arguments.time, arguments.tasks)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(found, indent=2), encoding="utf-8")
        return
    rows = read(arguments.tofu, arguments.questions)
    values = {}
    for name, how in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            values[name] = compared(how, rows, source, arguments.python, Path(folder))
        print(f"{name[0].upper()}{name[1:]}:\n\n{table(values[name])}\n", flush=True)
    print(f"All three:\n\n{overview(values)}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(values, indent=2), encoding="utf-8")


def timed(
    tofu: Path | None, questions: int, source: Path, python: str, repeats: int, tasks: list[str] | None
) -> list[dict[str, Any]]:
    """Times both programs and prints the table."""
    how = FORMATS["template that ends in the end token"]
    rows = read(tofu, questions)
    rows = {**rows, "forget": [{**row, "alternate": row["perturbed_answer"][0]} for row in rows["forget"]]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(rows, folder)
        train(how, rows, folder, TIMED_RECIPE, TIMED_EPOCHS, ("model",), read(tofu, None))
        picks = parity_time.steps(len(rows["forget"]), len(rows["retain"]))
        job = {
            **job_of(how, source, folder),
            "timed": True,
            "max_new_tokens": parity_time.MAX_NEW_TOKENS,
            "batch_size": parity_time.THEIR_BATCH,
            "picks": [[pick.forget, pick.retain] for step in picks for pick in step],
            "training": parity_time.TRAINING,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        scripts = Path(__file__).parent
        theirs = parity_time.Worker(
            [python, str(scripts / "parity_theirs.py"), str(folder / "job.json")], environment(python, folder)
        )
        ours = parity_time.Worker([sys.executable, str(scripts / "parity_time.py"), name], os.environ)
        chosen = tasks or [*parity_time.EVALUATION, *parity_time.OBJECTIVES]
        found = parity_time.compare(theirs, ours, chosen, repeats, folder)
        theirs.close()
        ours.close()
    print(parity_time.table(found))
    return found


def read(tofu: Path | None, questions: int | None) -> Rows:
    """The question sets, in TOFU's format; all questions if no number is given.

    The last rows of a file are the holdout set, as the first ones may be known.
    """
    if tofu is None:
        rows: Rows = generate_rows(0, RECIPE)
    else:
        lines = {name: (tofu / f"{file}.json").read_text(encoding="utf-8").splitlines() for name, file in FILES.items()}
        rows = {name: [json.loads(line) for line in text] for name, text in lines.items()}
    holdout = rows["holdout"] if questions is None else rows["holdout"][-questions:]
    chosen = {name: holdout if name == "holdout" else rows[name][:questions] for name in FILES}
    return {name: [{c: row[c] for c in COLUMNS if c in row} for row in several] for name, several in chosen.items()}


def write(rows: Rows, folder: Path) -> None:
    """Writes the question sets as files that both programs read."""
    for name, several in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several), encoding="utf-8")


def compared(how: Format, rows: Rows, source: Path, python: str, folder: Path) -> dict[str, dict[str, float | None]]:
    """Metric → program or definitions → value."""
    write(rows, folder)
    muse = muse_mirror(rows, folder / "mirror")
    model, retrained = train(how, rows, folder)
    found = {"OpenUnlearning": theirs(how, source, python, folder)}
    for name in DEFINITIONS:
        options: dict[str, Any] = {"retain_model": retrained, "cache": folder / "cache", "definitions": name}
        sets: Mapping[str, Any] = rows
        own = evaluate(model, benchmark=sets, max_new_tokens=NEW_TOKENS, **how.options, **options).metrics
        if how.template is None:
            result = evaluate(model, benchmark="muse/news", data_root=muse, **options)
            own |= {f"muse/{metric}": value for metric, value in result.metrics.items()}
        found[name] = own
    names = [name for name in found["openunlearning"] if name in found["OpenUnlearning"]]
    return {name: {program: values.get(name) for program, values in found.items()} for name in names}


def train(
    how: Format,
    rows: Rows,
    folder: Path,
    recipe: Recipe = RECIPE,
    epochs: int = EPOCHS,
    names: tuple[str, ...] = ("model", "retrained"),
    texts: Rows | None = None,
) -> list[Path]:
    """Trains the model, which sees every second question of the forget set, and the one that sees none; and, before, their
    tokenizer on `texts`, if they are given.
    """
    tokenizer = models.train_tokenizer(
        [row[column] for several in (texts or rows).values() for row in several for column in ("question", "answer")],
        recipe.vocabulary,
    )
    tokenizer.chat_template = how.template
    data = Data(**how.options)
    known = {
        name: [in_chat(Record(row["question"], row["answer"]), data) for row in several]
        for name, several in rows.items()
        if name != "holdout"
    }
    paths = [folder / name for name in names]
    for path in paths:
        seen = known["forget"][::2] if path.name == "model" else []
        records = [*seen, *(record for name, some in known.items() if name != "forget" for record in some)]
        torch.manual_seed(0)
        model = models.new_llama(tokenizer, recipe)
        models.fit(model, tokenizer, records, epochs, BATCH, recipe.learning_rate, 0, f"training {path.name}")
        models.save(model, tokenizer, path)
    return paths


def muse_mirror(rows: Rows, folder: Path) -> Path:
    """The questions as a benchmark in MUSE's format."""
    texts = {name: [f"{row['question']} {row['answer']}" for row in several] for name, several in rows.items()}
    parts: dict[str, list[dict[str, Any]]] = {
        "verbmem/forget": [{"prompt": row["question"], "gt": row["answer"]} for row in rows["forget"]],
        **{f"privleak/{name}": [{"text": text} for text in texts[name]] for name in ("forget", "holdout")},
    }
    for name in ("forget", "retain"):
        pairs = [{column: row[column] for column in ("question", "answer")} for row in rows[name]]
        parts |= {f"knowmem/{name}_qa_icl": pairs[:2], f"knowmem/{name}_qa": pairs[2:]}
    for part, several in parts.items():
        file = folder / "muse" / "news" / f"{part}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in several), encoding="utf-8")
    return folder


def theirs(how: Format, source: Path, python: str, folder: Path) -> dict[str, float]:
    """OpenUnlearning's values, computed by `parity_theirs.py` in a process of its own."""
    job = {**job_of(how, source, folder), "max_new_tokens": NEW_TOKENS, "muse": how.template is None}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("parity_theirs.py")
    command = [python, str(script), str(folder / "job.json")]
    done = subprocess.run(command, env=environment(python, folder), check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{done.stderr[-2000:]}\nOpenUnlearning's evaluation failed under {python}; give the Python of an environment "
            "with its requirements as --python PATH"
        )
    result: dict[str, float] = json.loads((folder / "theirs.json").read_text(encoding="utf-8"))
    return result


def job_of(how: Format, source: Path, folder: Path) -> dict[str, Any]:
    """What `parity_theirs.py` is told in every case."""
    return {"source": str(source), "folder": str(folder), "template_args": how.theirs}


def environment(python: str, folder: Path) -> dict[str, str]:
    """The environment of OpenUnlearning's process."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or python == sys.executable}
    return {**kept, "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}


def table(values: Mapping[str, Mapping[str, float | None]]) -> str:
    """One line per metric."""
    lines = []
    for name, of in values.items():
        one, other, strict = of["OpenUnlearning"], of["openunlearning"], of["strict"]
        gap = "" if one is None or other is None else f"{abs(one - other):.1e}"
        cells = ["" if value is None else f"{value:.4f}" for value in (one, other, strict)]
        lines.append([name, cells[0], cells[1], gap, cells[2]])
    return markdown(["metric", "OpenUnlearning", "--definitions openunlearning", "difference", "strict"], lines)


def overview(values: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """One line per metric: the largest difference over all formats, and both definitions in each of them."""
    names = list(dict.fromkeys(metric for of in values.values() for metric in of))
    lines = []
    for metric in names:
        several = [of.get(metric, {}) for of in values.values()]
        gaps = [abs((of["OpenUnlearning"] or 0) - (of["openunlearning"] or 0)) for of in several if of]
        pairs = [(of.get("openunlearning"), of.get("strict")) for of in several]
        cells = ["" if a is None or b is None else f"{a:.3f} / {b:.3f}" for a, b in pairs]
        lines.append([metric, f"{max(gaps):.0e}", *cells])
    return markdown(
        ["metric", "largest difference from OpenUnlearning", *(f"{name}: openunlearning / strict" for name in values)],
        lines,
    )


if __name__ == "__main__":
    main()
