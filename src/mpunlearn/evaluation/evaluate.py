"""One checkpoint, one benchmark, one JSON: metrics, values of every example, settings and versions.

What a model says is cached by the digest of checkpoint, data and settings, so the retrained model that others are compared with
is evaluated once.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.client import Data
from mpunlearn.errors import CheckpointError, PlanError
from mpunlearn.evaluation import muse, tofu
from mpunlearn.evaluation.general import general_ability
from mpunlearn.evaluation.robustness import quantized, relearning
from mpunlearn.evaluation.sets import Questions, read_sets
from mpunlearn.evaluation.tofu import PerExample
from mpunlearn.files import read_json, write_json
from mpunlearn.lm.model import load

FORMAT = 1
_LIBRARIES = ("mpunlearn", "torch", "transformers", "tokenizers", "rouge-score", "scipy", "numpy")


@dataclass(frozen=True)
class Report:
    """The result of an evaluation."""

    metrics: dict[str, float]
    retrained: dict[str, float] | None
    """The same of the model that never saw the forget set."""
    robustness: dict[str, dict[str, Any]]
    """Curves of this model and of the retrained one."""
    per_example: PerExample
    provenance: dict[str, Any]
    """Checkpoint, settings, digests and versions."""

    def table(self) -> str:
        """The metrics as a Markdown table, and the curves below it."""
        heads = ["metric", "model", *(["retrained"] if self.retrained else [])]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, value in self.metrics.items():
            other = [] if self.retrained is None else [_number(self.retrained.get(name))]
            lines.append(f"| {' | '.join([name, _number(value), *other])} |")
        for curve, models in self.robustness.items():
            lines += ["", f"{curve}:"]
            for model, points in models.items():
                lines.append(f"  {model}: " + ", ".join(f"{at}: {_number(value)}" for at, value in points.items()))
        return "\n".join(lines)


def evaluate(
    checkpoint: str | Path,
    *,
    benchmark: str = "tofu",
    forget_split: str = "forget10",
    retain_model: str | Path | None = None,
    holdout: str | None = None,
    out: str | Path | None = None,
    robustness: bool = False,
    relearn_rate: float = 1e-4,
    tasks: str | None = None,
    tasks_folder: str | Path | None = None,
    max_new_tokens: int = 200,
    cache: str | Path | None = None,
    data: Data | None = None,
) -> Report:
    """Evaluates a checkpoint on a benchmark.

    Args:
        checkpoint: a checkpoint directory.
        benchmark: tofu, muse/news, muse/books, or a folder with forget.jsonl, retain.jsonl, … in TOFU's format.
        forget_split: which of TOFU's forget sets.
        retain_model: the checkpoint that never saw the forget set; forget quality and PrivLeak compare with it.
        holdout: questions that no model was trained on, for membership inference (default: the benchmark's own).
        out: a file for the whole result as JSON.
        robustness: also draw the curves under relearning and quantization.
        relearn_rate: learning rate of relearning.
        tasks: tasks of lm-eval for general ability, separated by commas.
        tasks_folder: folder with lm-eval task files of one's own.
        max_new_tokens: length of generated answers, in tokens.
        cache: folder for results, by the digest of all that went in (default: in the user's cache folder).
        data: where local mirrors of benchmarks are.

    Returns:
        Metrics, the retrained model's, curves, and values of every example.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        DataError: the benchmark cannot be read.
    """
    data, settings = data or Data(), {"max_new_tokens": max_new_tokens, "relearn_rate": relearn_rate, "tasks": tasks}
    if max_new_tokens < 1:
        raise PlanError(f"--max-new-tokens: expected at least 1, found {max_new_tokens}")
    is_muse = benchmark in ("muse/news", "muse/books")
    sets = {} if is_muse else read_sets(benchmark, forget_split, holdout, data)
    what = hashlib.sha256(
        json.dumps([FORMAT, benchmark if is_muse else {k: asdict(v) for k, v in sets.items()}, asdict(data)]).encode()
    ).hexdigest()
    root = Path(cache) if cache is not None else cache_folder() / "evaluations"
    reference = retain_model if not is_muse and "holdout" in sets else None

    def one(path: str | Path, reference: str | Path | None) -> dict[str, Any]:
        parts = [what, checkpoint_digest(path), settings, robustness, _versions()]
        parts.append(checkpoint_digest(reference) if reference is not None else None)
        file = root / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"
        if file.is_file():
            return read_json(file)
        value = _one(Path(path), benchmark, sets, data, reference, robustness, settings)
        value["general"] = general_ability(path, tasks.split(","), tasks_folder) if tasks else {}
        root.mkdir(parents=True, exist_ok=True)
        write_json(file, value)
        return value

    own = one(checkpoint, reference)
    retrained = one(retain_model, None) if retain_model is not None else None
    summarize = muse.summarize if is_muse else tofu.summarize
    models = {"model": own, **({"retrained": retrained} if retrained is not None else {})}
    report = Report(
        metrics={
            **summarize(own["per_example"], None if retrained is None else retrained["per_example"]),
            **own["general"],
        },
        retrained=None
        if retrained is None
        else {**summarize(retrained["per_example"], retrained["per_example"]), **retrained["general"]},
        robustness={
            curve: {name: found["robustness"][curve] for name, found in models.items()} for curve in own["robustness"]
        },
        per_example=own["per_example"],
        provenance={
            "checkpoint": str(checkpoint),
            "checkpoint_digest": checkpoint_digest(checkpoint),
            "benchmark": benchmark,
            "forget_split": forget_split if benchmark == "tofu" else None,
            "data_digest": what,
            "decoding": "greedy",
            **settings,
            "versions": _versions(),
        },
    )
    if out is not None:
        try:
            write_json(Path(out), asdict(report))
        except OSError as error:
            raise CheckpointError(f"--out {out}: cannot be written: {error.strerror}") from error
    return report


def cache_folder() -> Path:
    """Where this program keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpunlearn"


def _one(
    path: Path,
    benchmark: str,
    sets: Mapping[str, Questions],
    data: Data,
    reference: str | Path | None,
    robustness: bool,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What one model says."""
    model, tokenizer = load(path)
    if not sets:
        return {"per_example": muse.measure(model, tokenizer, benchmark, data), "robustness": {}}
    other = load(Path(reference))[0] if reference is not None else None
    length = settings["max_new_tokens"]
    found = tofu.measure(model, tokenizer, sets, max_new_tokens=length, reference=other)
    curves: dict[str, Any] = {}
    if robustness:
        rate = settings["relearn_rate"]
        curves["forget probability after steps of relearning"] = relearning(
            model, tokenizer, sets["forget"], learning_rate=rate
        )
        kept = {name: questions for name, questions in sets.items() if name != "holdout"}
        rounded = quantized(model, tokenizer, kept, max_new_tokens=length)
        whole = tofu.summarize(found)
        for metric in ("forget_probability", "model_utility"):
            if metric in whole:
                curves[f"{metric} at bits"] = {
                    "all": whole[metric],
                    **{bits: values[metric] for bits, values in rounded.items()},
                }
    return {"per_example": found, "robustness": curves}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
