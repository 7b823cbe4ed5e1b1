"""The command `evaluate`: what a checkpoint still knows of a benchmark, as metrics and as values for every example.

`measurement` does the work and is imported only when it starts, so that the command line can show its help without
loading torch. `compare` prints and draws several checkpoints.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpunlearn.errors import FileError, PlanError
from mpunlearn.evaluation.compare import Compared, cell, check_figure, comparison_table, draw
from mpunlearn.evaluation.definitions import Name
from mpunlearn.extras import needs
from mpunlearn.files import as_path, cache_folder, write_json
from mpunlearn.lm.sources import Data, Source, TemplateKwargs
from mpunlearn.tables import markdown

if TYPE_CHECKING:
    from mpunlearn.evaluation.measurement import Measurement

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
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """Metric → lower and upper limit of its 95 % bootstrap interval over examples."""
    compared: dict[str, Compared] = field(default_factory=dict)
    """Checkpoint → the same for another checkpoint."""
    format: int = 3

    def table(self) -> str:
        """The metrics as a Markdown table, followed by one table for each curve."""
        first = str(self.provenance.get("checkpoint", "model")) if self.compared else "model"
        if self.intervals:
            tables = [comparison_table(first, self.metrics, self.intervals, self.compared, self.retrained)]
        else:
            header = ["metric", "model", *(["retrained"] if self.retrained is not None else [])]
            models = [self.metrics, *([self.retrained] if self.retrained is not None else [])]
            tables = [markdown(header, [[name, *(cell(model.get(name)) for model in models)] for name in self.metrics])]
        for curve, lines in self.robustness.items():
            rows = [[model, *map(cell, points.values())] for model, points in lines.items()]
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
    original_model: str | Path | None = None,
    compare: Sequence[str | Path] = (),
    figure: str | Path | None = None,
    out: str | Path | None = None,
    depth: bool = False,
    fluency_model: str | Path | None = None,
    worst_case: bool = False,
    samples: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    leak_threshold: float = 0.5,
    robustness: bool = False,
    relearn_rate: float = 1e-4,
    tasks: str | None = None,
    tasks_folder: str | Path | None = None,
    tasks_chat: bool = False,
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
        benchmark: One of tofu, muse/news, muse/books, wmdp/bio, wmdp/cyber, wmdp/chem, rwku/TARGET (such as
            rwku/Stephen_King), knowundo/privacy and knowundo/copyright, or a folder with forget.jsonl, retain.jsonl, …
            in TOFU's format. Python programs can also give such sets themselves, as a dict with lists of dicts or a
            `datasets.Dataset`.
        forget_split: The TOFU forget set to evaluate. Other benchmarks have only one.
        retain_model: A checkpoint that never saw the forget set. Forget quality, PrivLeak, mia_reference, UDS and the
            privacy score compare the model with it.
        holdout: Questions that no model was trained on, for membership inference (default: holdout.jsonl in the
            benchmark's folder, if it exists). Only for TOFU and folders; MUSE has its own.
        original_model: The checkpoint before unlearning. UDS and the overall score need it.
        compare: Further checkpoints, for a table and a figure with one column and one color for each.
        figure: A new file for a figure of the metrics with their intervals (svg, png or pdf). It needs the extra figures.
        out: A new file for the full result as JSON. If the checkpoint is the result of a run on this machine, the run's
            record gets its digest.
        depth: Also measure UDS: how much of the knowledge is gone from the hidden states. It needs --retain-model and
            --original-model, and runs the model once per layer. Only for TOFU and folders.
        fluency_model: A folder with a classifier that has a class named clean, such as
            madhurjindal/autonlp-Gibberish-Detector-492513457. It judges the answers to forget questions, and their
            fluency becomes part of the utility score. Only for TOFU and folders.
        worst_case: Also ask every forget question in other words and with answers begun for the model, and report the
            highest ROUGE-L recall. Only for TOFU and folders.
        samples: Also sample this many answers to each forget question, for leak@k. Only for TOFU and folders.
        temperature: Temperature of these samples.
        top_p: Sample only from the likeliest tokens with this total probability.
        leak_threshold: ROUGE-L recall from which a sample leaks. In rows with the column entity, a sample leaks if it
            contains the entity.
        robustness: Also measure curves and scores under relearning and quantization. Only for TOFU and folders.
        relearn_rate: The learning rate for relearning.
        tasks: Tasks of lm-eval that measure general ability, separated by commas. They need the extra lm-eval.
        tasks_folder: A folder with your own task files for lm-eval.
        tasks_chat: Ask the tasks' questions in the model's chat template (default: as plain text, which is lm-eval's
            default, too).
        definitions: How metrics are defined where OpenUnlearning's evaluation and the papers differ, see
            docs/definitions.md. All models are measured with the same definitions.
        system_prompt: System message before every question (default: none). Only for TOFU and folders.
        template_kwargs: A value for the chat template, such as date_string="10 Apr 2025". Can be given several times. Only for
            TOFU and folders.
        max_new_tokens: Maximum length of generated answers, in tokens. Only for TOFU and folders; other
            benchmarks have their own limits.
        cache: A folder for cached measurements, so that no model is measured twice (default: mpunlearn/evaluations in
            the user's cache folder).
        data_root: Folder with local mirrors of benchmarks, which are used instead of the Hub.
        batch_size: Maximum number of sequences in a batch (default: as many as fit into 8192 tokens). It changes results
            only by rounding, but draws other --samples.
        device: Device of the model, such as cpu or cuda (default: a GPU if there is one).
        precision: Dtype of the weights. The narrow ones need half the memory, and change the results a little.

    Returns:
        Metrics of all checkpoints with intervals, curves, and the values for every example.

    Raises:
        FileError: A checkpoint cannot be read, `out` or `figure` exists, or they or the cache cannot be written.
        DataError: The benchmark, or the data of a task, cannot be read.
        PlanError: An option has an impossible value or needs another one, or lm-eval or matplotlib is needed and not
            installed.
    """
    needs("client", "evaluate")
    checkpoint = as_path(checkpoint, "checkpoint")
    retain_model = as_path(retain_model, "--retain-model") if retain_model is not None else None
    benchmark = benchmark if isinstance(benchmark, Mapping) else str(as_path(benchmark, "--benchmark"))
    holdout = str(holdout) if isinstance(holdout, str | Path) else holdout
    data_root = str(as_path(data_root, "--data-root")) if data_root is not None else None
    tasks_folder = str(as_path(tasks_folder, "--tasks-folder")) if tasks_folder is not None else None
    folder = as_path(cache, "--cache") if cache is not None else cache_folder() / "evaluations"
    out = as_path(out, "--out") if out is not None else None
    original_model = as_path(original_model, "--original-model") if original_model is not None else None
    others = [as_path(other, "--compare") for other in compare]
    figure = as_path(figure, "--figure") if figure is not None else None
    if out is not None:
        _check_new(out)
    if figure is not None:
        check_figure(figure)
    if depth and (retain_model is None or original_model is None):
        raise PlanError("--depth: needs --retain-model and --original-model: UDS compares the model with both")
    if len({checkpoint, *others}) < 1 + len(others):
        raise PlanError(
            "--compare: expected checkpoints that differ from one another and from the first, found one twice"
        )

    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.evaluation import measurement, summary
    from mpunlearn.protocol.record.log import append_result

    for model_path in (checkpoint, retain_model, original_model, *others):
        if model_path is not None:
            Checkpoint(model_path)  # catches a mistyped path before data is downloaded
    settings = measurement.Settings(
        max_new_tokens=max_new_tokens,
        robustness=robustness,
        relearn_rate=relearn_rate,
        tasks=tasks,
        tasks_folder=tasks_folder,
        tasks_chat=tasks_chat,
        precision=precision,
        definitions=definitions,
        system_prompt=system_prompt,
        template_kwargs=template_kwargs,
        depth=depth,
        fluency_model=None if fluency_model is None else str(as_path(fluency_model, "--fluency-model")),
        worst_case=worst_case,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        leak_threshold=leak_threshold,
    )
    machine = measurement.Machine(device, batch_size)
    examples = measurement.read_benchmark(benchmark, forget_split, holdout, settings, Data(data_root=data_root))
    model = measurement.Subject.of(checkpoint)
    retrained = measurement.Subject.of(retain_model) if retain_model is not None else None
    original = measurement.Subject.of(original_model) if original_model is not None else None

    def measured(
        subject: measurement.Subject,
        reference: measurement.Subject | None = retrained,
        how: measurement.Settings = settings,
    ) -> "Measurement":
        return measurement.measured(subject, examples, how, folder, reference, machine, original)

    own = measured(model)
    subjects = {str(path): measurement.Subject.of(path) for path in others}
    further = {name: (subject.digest, measured(subject)) for name, subject in subjects.items()}
    theirs = None if retrained is None else measured(retrained, None)
    # Of the original model only the utility is used, unless it is also one of those that are compared.
    brief = dataclasses.replace(settings, depth=False, worst_case=False, samples=0, robustness=False, tasks=None)
    listed = original_model in (checkpoint, *others)
    before = None if original is None else measured(original, how=settings if listed else brief)
    measurements = {"model": own, **({} if theirs is None else {"retrained": theirs})}
    intervals, compared = summary.compared(examples, own, further, theirs, before, settings)
    evaluation = Evaluation(
        metrics=summary.summarize(examples, own, theirs, before, settings),
        retrained=None if theirs is None else summary.summarize(examples, theirs, theirs, before, settings),
        robustness={
            curve: {name: value.robustness[curve] for name, value in measurements.items()} for curve in own.robustness
        },
        per_example=own.per_example,
        intervals=intervals,
        compared=compared,
        provenance={
            "checkpoint": str(checkpoint),
            "checkpoint_digest": model.digest,
            "retain_model": None if retain_model is None else str(retain_model),
            "retain_model_digest": None if retrained is None else retrained.digest,
            "original_model": None if original_model is None else str(original_model),
            "original_model_digest": None if original is None else original.digest,
            "benchmark": IN_MEMORY if isinstance(benchmark, Mapping) else benchmark,
            "forget_split": forget_split if benchmark == "tofu" else None,
            "holdout": holdout if holdout is None or isinstance(holdout, str) else IN_MEMORY,
            "data_digest": measurement.benchmark_digest(examples),
            "decoding": "greedy",
            "bootstrap": summary.BOOTSTRAP,
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
    if figure is not None:
        drawn = {name: (item.metrics, item.intervals) for name, item in compared.items()}
        draw(figure, {str(checkpoint): (evaluation.metrics, intervals), **drawn}, evaluation.retrained)
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
