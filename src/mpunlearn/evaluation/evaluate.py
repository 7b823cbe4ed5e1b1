"""The command `evaluate`: what a checkpoint still knows of a benchmark, as metrics and as values for every example.

`measurement` does the work and is imported only when it starts, so that the command line can show its help without
loading torch. Not covered: comparing more than two models. To do that, write a JSON file for each of them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpunlearn.errors import FileError
from mpunlearn.evaluation.definitions import Name
from mpunlearn.extras import needs
from mpunlearn.files import as_path, cache_folder, write_json
from mpunlearn.lm.sources import Data, Source, TemplateKwargs
from mpunlearn.tables import markdown

IN_MEMORY = "(given in memory)"
"""Stands for examples in the provenance of an evaluation; their digest is there, too."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Metrics have OpenUnlearning's names."""

    metrics: dict[str, float]
    """Metric → value."""
    retrained: dict[str, float] | None
    """The same metrics for the model that never saw the forget set, if one was given."""
    robustness: dict[str, dict[str, dict[str, float]]]
    """Curve → "model" or "retrained" → point, such as a number of steps → value."""
    per_example: dict[str, dict[str, list[float]]]
    """Set → metric → one value per example."""
    provenance: dict[str, Any]
    """Checkpoints, settings, digests and versions."""
    format: int = 2

    def table(self) -> str:
        """The metrics as a Markdown table, followed by one table for each curve."""
        header = ["metric", "model", *(["retrained"] if self.retrained is not None else [])]
        models = [self.metrics, *([self.retrained] if self.retrained is not None else [])]
        tables = [markdown(header, [[name, *(_cell(model.get(name)) for model in models)] for name in self.metrics])]
        for curve, lines in self.robustness.items():
            rows = [[model, *map(_cell, points.values())] for model, points in lines.items()]
            tables.append(markdown([curve, *lines["model"]], rows))
        return "\n\n".join(tables)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON, as `evaluate` writes it. Infinities and NaN, which JSON lacks, become null."""
        plain: dict[str, Any] = _finite(dataclasses.asdict(self))
        return plain


def evaluate(
    checkpoint: str | Path,
    *,
    benchmark: str | Mapping[str, Source] = "tofu",
    forget_split: str = "forget10",
    retain_model: str | Path | None = None,
    holdout: Source | None = None,
    out: str | Path | None = None,
    robustness: bool = False,
    relearn_rate: float = 1e-4,
    tasks: str | None = None,
    tasks_folder: str | Path | None = None,
    definitions: Name = "openunlearning",
    system_prompt: str | None = None,
    template_kwargs: TemplateKwargs | None = None,
    max_new_tokens: int = 200,
    cache: str | Path | None = None,
    data_root: str | Path | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Evaluation:
    """Evaluates a checkpoint on a benchmark.

    Args:
        checkpoint: The checkpoint directory to evaluate.
        benchmark: One of tofu, muse/news and muse/books, or a folder with forget.jsonl, retain.jsonl, … in TOFU's
            format. Python programs can also give such sets themselves, as a dict with lists of dicts or a
            `datasets.Dataset`.
        forget_split: The TOFU forget set to evaluate. Other benchmarks have only one.
        retain_model: A checkpoint that never saw the forget set. Forget quality, PrivLeak and mia_reference compare the
            model with it.
        holdout: Questions that no model was trained on, for membership inference (default: holdout.jsonl in the
            benchmark's folder, if it exists). Not available for MUSE, which has its own.
        out: A new file for the full result as JSON. If the checkpoint is the result of a run on this machine, the run's
            record gets its digest.
        robustness: Also measure curves under relearning and quantization. Not available for MUSE.
        relearn_rate: The learning rate for relearning.
        tasks: Tasks of lm-eval that measure general ability, separated by commas. They need the extra lm-eval.
        tasks_folder: A folder with your own task files for lm-eval.
        definitions: How metrics are defined where OpenUnlearning's evaluation and the papers differ, see
            docs/definitions.md. Both models are measured with the same definitions.
        system_prompt: System message before every question (default: none). Not available for MUSE.
        template_kwargs: A value for the chat template, such as date_string="10 Apr 2025". Can be given several times. Not
            available for MUSE.
        max_new_tokens: Maximum length of generated answers, in tokens. MUSE has its own limits.
        cache: A folder for cached measurements, so that no model is measured twice (default: mpunlearn/evaluations in
            the user's cache folder).
        data_root: Folder with local mirrors of benchmarks, which are used instead of the Hub.
        batch_size: Maximum number of sequences in a batch (default: as many as fit into 8192 tokens). It changes results
            only by rounding.
        device: Device of the model, such as cpu or cuda (default: a GPU if there is one).
        precision: Dtype of the weights. The narrow ones need half the memory, and change the results a little.

    Returns:
        Metrics of the checkpoint and of the retrained model, curves, and the values for every example.

    Raises:
        FileError: A checkpoint cannot be read, `out` exists, or `out` or the cache cannot be written.
        DataError: The benchmark, or the data of a task, cannot be read.
        PlanError: An option has an impossible value, or lm-eval is needed and not installed.
    """
    checkpoint = as_path(checkpoint, "checkpoint")
    retain_model = as_path(retain_model, "--retain-model") if retain_model is not None else None
    benchmark = benchmark if isinstance(benchmark, Mapping) else str(as_path(benchmark, "--benchmark"))
    holdout = str(holdout) if isinstance(holdout, str | Path) else holdout
    data_root = str(as_path(data_root, "--data-root")) if data_root is not None else None
    tasks_folder = str(as_path(tasks_folder, "--tasks-folder")) if tasks_folder is not None else None
    folder = as_path(cache, "--cache") if cache is not None else cache_folder() / "evaluations"
    out = as_path(out, "--out") if out is not None else None
    if out is not None:
        _check_new(out)

    needs("client", "evaluate")
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.evaluation import measurement
    from mpunlearn.protocol.record.log import append_result

    for model_path in (checkpoint, retain_model):
        if model_path is not None:
            Checkpoint(model_path)  # catches a mistyped path before data is downloaded
    settings = measurement.Settings(
        max_new_tokens=max_new_tokens,
        robustness=robustness,
        relearn_rate=relearn_rate,
        tasks=tasks,
        tasks_folder=tasks_folder,
        precision=precision,
        definitions=definitions,
        system_prompt=system_prompt,
        template_kwargs=template_kwargs,
    )
    machine = measurement.Machine(device, batch_size)
    examples = measurement.read_benchmark(benchmark, forget_split, holdout, settings, Data(data_root=data_root))
    model = measurement.Subject.of(checkpoint)
    retrained = measurement.Subject.of(retain_model) if retain_model is not None else None
    own = measurement.measured(model, examples, settings, folder, retrained, machine)
    measurements = {"model": own}
    if retrained is not None:
        measurements["retrained"] = measurement.measured(retrained, examples, settings, folder, machine=machine)
    other = measurements.get("retrained")
    evaluation = Evaluation(
        metrics=measurement.summarize(examples, own, other, settings),
        retrained=None if other is None else measurement.summarize(examples, other, other, settings),
        robustness={
            curve: {name: value.robustness[curve] for name, value in measurements.items()} for curve in own.robustness
        },
        per_example=own.per_example,
        provenance={
            "checkpoint": str(checkpoint),
            "checkpoint_digest": model.digest,
            "retain_model": None if retain_model is None else str(retain_model),
            "retain_model_digest": None if retrained is None else retrained.digest,
            "benchmark": IN_MEMORY if isinstance(benchmark, Mapping) else benchmark,
            "forget_split": forget_split if benchmark == "tofu" else None,
            "holdout": holdout if holdout is None or isinstance(holdout, str) else IN_MEMORY,
            "data_digest": measurement.benchmark_digest(examples),
            "decoding": "greedy",
            **dataclasses.asdict(settings),
            **dataclasses.asdict(machine),
            "versions": measurement.versions(),
        },
    )
    if out is not None:
        _check_new(out)
        try:
            write_json(out, evaluation.to_json())
        except OSError as error:
            raise FileError(
                f"--out {out}: cannot be written: {error.strerror}; run again with another file (the measurements are "
                "cached)"
            ) from error
        append_result("evaluated", checkpoint, out)
    return evaluation


def _check_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise FileError(f"--out {out}: already exists; name another file, or remove this one")


def _finite(value: Any) -> Any:
    """Replaces infinities and NaN by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: float | None) -> str:
    """A number as a table cell; empty if it was not measured."""
    if value is None:
        return ""
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
