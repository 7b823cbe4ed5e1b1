"""Measuring one model on one benchmark, with a cache.

A measurement takes long, and every unlearned model is compared with the same retrained model. Each `Measurement` is
therefore cached in a file whose name is the digest of everything it depends on: checkpoint, examples, settings and
library versions. If the file is damaged, or was written by another version of this program, the model is measured again
and the file is replaced.

Not covered: sharing the work between processes. Two processes that measure the same model at once both do all of it.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mpunlearn import schema
from mpunlearn.checkpoint import FLOAT_DTYPES, checkpoint_digest
from mpunlearn.errors import FileError, PlanError, SchemaError
from mpunlearn.evaluation import durability, named, tofu
from mpunlearn.evaluation.definitions import DEFINITIONS, Name
from mpunlearn.evaluation.depth import likelihood_drops
from mpunlearn.evaluation.fluency import fluency_judge
from mpunlearn.evaluation.general import general_ability
from mpunlearn.evaluation.leakage import Sampling, measure_leaks
from mpunlearn.evaluation.robustness import curves
from mpunlearn.evaluation.sets import Questions, read_sets
from mpunlearn.evaluation.worst_case import worst_case
from mpunlearn.lm.model import load, load_model, model_device
from mpunlearn.lm.sources import Data, Source, TemplateKwargs

LIBRARIES = ("mpunlearn", "torch", "transformers", "tokenizers", "rouge-score", "scipy", "numpy")
"""Libraries whose versions can change the results."""

Benchmark = Mapping[str, Questions] | named.Named
"""What models are measured on: question sets by name, or a benchmark of a form of its own."""


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Raises:
        PlanError: a value has the wrong type or is out of range.
    """

    max_new_tokens: int
    """Maximum length of generated answers, in tokens."""
    robustness: bool
    """Whether curves under relearning and quantization are measured."""
    relearn_rate: float
    """Learning rate of relearning."""
    tasks: str | None
    """Tasks of lm-eval, separated by commas."""
    tasks_folder: str | None
    """Folder with the user's own task files."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the model's weights."""
    definitions: Name = "openunlearning"
    """Which definitions of the metrics."""
    system_prompt: str | None = None
    """System message before every question."""
    template_kwargs: TemplateKwargs | None = None
    """Values for the chat template."""
    depth: bool = False
    """Whether hidden states are patched into the original model, for UDS."""
    fluency_model: str | None = None
    """Folder with a classifier of gibberish."""
    worst_case: bool = False
    """Whether forget questions are asked in several ways."""
    samples: int = 0
    """Samples per question, for leak@k."""
    temperature: float = 1.0
    """Temperature of these samples."""
    top_p: float = 1.0
    """Total probability of the tokens that are sampled."""
    leak_threshold: float = 0.5
    """ROUGE-L recall from which a sample leaks."""
    tasks_chat: bool = False
    """Whether tasks of lm-eval use the chat template."""

    @property
    def chat(self) -> Data:
        """How questions are formatted."""
        return Data(system_prompt=self.system_prompt, template_kwargs=self.template_kwargs)

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled."""
        return Sampling(self.samples, self.temperature, self.top_p, self.leak_threshold)

    def __post_init__(self) -> None:
        schema.check_options(self)
        _ = self.sampling  # checks its options
        if self.max_new_tokens < 1:
            raise PlanError(f"--max-new-tokens: expected at least 1, found {self.max_new_tokens}")
        if self.relearn_rate <= 0:
            raise PlanError(f"--relearn-rate: expected a number above 0, found {self.relearn_rate}")
        if self.robustness and self.precision != "float32":
            raise PlanError(f"--precision {self.precision}: --robustness trains the model, which needs float32")
        _ = self.chat  # checks its values


@dataclass(frozen=True)
class Machine:
    """Where models are measured. It changes the results only by rounding and other draws of samples, so the cache ignores it.

    Raises:
        PlanError: the device is not available, or the batch size is below 1.
    """

    device: str | None = None
    """Device (default: a GPU if there is one)."""
    batch_size: int | None = None
    """Maximum number of sequences in a batch (default: as many as `probe.BATCH_TOKENS` allows)."""

    def __post_init__(self) -> None:
        schema.check_options(self)
        model_device(self.device)
        if self.batch_size is not None and self.batch_size < 1:
            raise PlanError(f"--batch-size: expected at least 1, found {self.batch_size}")


@dataclass(frozen=True)
class Subject:
    """A model to be measured."""

    path: Path
    """Its checkpoint directory."""
    digest: str
    """SHA-256 (hex) of the checkpoint."""

    @classmethod
    def of(cls, path: Path) -> "Subject":
        """The model of a checkpoint directory.

        Raises:
            CheckpointError: it cannot be read.
        """
        return cls(path, checkpoint_digest(path))


@dataclass(frozen=True)
class Measurement:
    """The values measured for one model: the content of a cache file.

    Numbers are declared as `Any`, since `schema` accepts only finite ones and a model that diverged yields others.

    Raises:
        SchemaError: a value is not a number.
    """

    per_example: dict[str, dict[str, list[Any]]]
    """Set → metric → one number per example."""
    robustness: dict[str, dict[str, Any]]
    """Curve → point → number."""
    general: dict[str, Any]
    """lm-eval's metrics by name."""
    format: int = 3

    def __post_init__(self) -> None:
        lists = [values for metrics in self.per_example.values() for values in metrics.values()]
        points = [list(values.values()) for values in (*self.robustness.values(), self.general)]
        for number in (number for values in (*lists, *points) for number in values):
            if not isinstance(number, float | int):
                raise SchemaError(f"{type(self).__name__}: expected numbers, found {number!r:.60}")


def read_benchmark(
    benchmark: str | Mapping[str, Source], forget_split: str, holdout: Source | None, settings: Settings, data: Data
) -> Benchmark:
    """Reads the examples of a benchmark.

    Args:
        benchmark: a name that `named` or `sets` knows, a folder in TOFU's format, or question sets by name.
        forget_split: which of TOFU's forget sets to read.
        holdout: source of the holdout set, for TOFU or a folder.
        settings: how models are measured.
        data: where local mirrors are.

    Raises:
        DataError: the benchmark cannot be read.
        PlanError: an option is not available for this benchmark.
    """
    if isinstance(benchmark, Mapping) or not named.is_named(benchmark):
        return read_sets(benchmark, forget_split, holdout, data)
    unavailable = {
        "--robustness": settings.robustness,
        "--holdout": holdout is not None,
        "--system-prompt": settings.system_prompt is not None,
        "--template-kwargs": bool(settings.template_kwargs),
        "--depth": settings.depth,
        "--samples": settings.samples > 0,
        "--worst-case": settings.worst_case,
        "--fluency-model": settings.fluency_model is not None,
    }
    for option, given in unavailable.items():
        if given:
            raise PlanError(f"{option}: not available for {benchmark}; leave it out, or choose another --benchmark")
    return named.read(benchmark, data)


def benchmark_digest(benchmark: Benchmark) -> str:
    """SHA-256 (hex) of a benchmark's examples, in order."""
    if isinstance(benchmark, named.Named):
        return _digest(asdict(benchmark))
    sets = {name: asdict(questions) for name, questions in benchmark.items()}
    for questions in sets.values():
        for name in ("entities", "rewordings"):
            if not questions[name]:
                del questions[name]  # older versions did not know them
    return _digest(sets)


def versions() -> dict[str, str]:
    """Versions of `LIBRARIES`."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def measured(
    subject: Subject,
    benchmark: Benchmark,
    settings: Settings,
    cache: Path,
    reference: Subject | None = None,
    machine: Machine | None = None,
    original: Subject | None = None,
) -> Measurement:
    """The measurement of a model, taken from the cache or made now.

    Args:
        subject: the model.
        benchmark: what the model is measured on.
        settings: how the model is measured.
        cache: the cache folder.
        reference: the model that never saw the forget set, for `mia_reference` on a benchmark with a holdout set.
        machine: device and batch size.
        original: the model before unlearning, for UDS.

    Raises:
        UnloadableError: a model or its tokenizer cannot be loaded.
        DataError: the data of a task of lm-eval cannot be loaded, or the forget set is too small for relearning.
        PlanError: lm-eval is not installed, or has no such task.
        FileError: the cache cannot be written.
    """
    if isinstance(benchmark, named.Named) or "holdout" not in benchmark:
        reference = None
    original = original if settings.depth else None
    models = [subject.digest, *(None if model is None else model.digest for model in (reference, original))]
    judge = None if settings.fluency_model is None else checkpoint_digest(settings.fluency_model)
    key = [Measurement.format, *models, judge, benchmark_digest(benchmark), asdict(settings), versions()]
    file = cache / f"{_digest(key)}.json"
    if (cached := _read(file)) is not None:
        return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"--cache {cache}: cannot be created: {error.strerror}; fix the cause, or name another folder"
        ) from error
    measurement = _measure(subject, benchmark, settings, reference, original, machine or Machine())
    schema.write(file, measurement, 0o666)
    return measurement


def _measure(
    subject: Subject,
    benchmark: Benchmark,
    settings: Settings,
    reference: Subject | None,
    original: Subject | None,
    machine: Machine,
) -> Measurement:
    tasks = [task.strip() for task in settings.tasks.split(",")] if settings.tasks else []
    definitions = DEFINITIONS[settings.definitions]
    device, batch_size, dtype = machine.device, machine.batch_size, FLOAT_DTYPES[settings.precision]
    options: dict[str, Any] = {"device": device, "precision": settings.precision, "batch_size": batch_size}
    options["chat"] = settings.tasks_chat
    general = general_ability(subject.path, tasks, settings.tasks_folder, **options) if tasks else {}
    model, tokenizer = load(subject.path, device, dtype)
    if isinstance(benchmark, named.Named):
        return Measurement(named.measure(model, tokenizer, benchmark, batch_size, definitions), {}, general)

    def loaded(other: Subject) -> Any:  # a model that is compared with itself is loaded only once
        return model if other.digest == subject.digest else load_model(other.path, device, dtype)

    how: dict[str, Any] = {"batch_size": batch_size, "definitions": definitions, "data": settings.chat}
    answering: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, **how}
    judge = None if settings.fluency_model is None else fluency_judge(Path(settings.fluency_model), device)
    forget, drops = benchmark["forget"], []
    if original is not None:  # first, since three models may not fit together
        drops = likelihood_drops(loaded(original), model, tokenizer, forget, **how).T.tolist()
    per_example = tofu.measure(
        model,
        tokenizer,
        benchmark,
        reference=None if reference is None else loaded(reference),
        judge=judge,
        **answering,
    )
    per_example["forget"] |= {f"{tofu.DROP}{layer}": values for layer, values in enumerate(drops)}
    if settings.samples:
        per_example["forget"] |= measure_leaks(model, tokenizer, forget, settings.sampling, **answering)
    if settings.worst_case:
        per_example["forget"]["Q_A_WORST_ROUGE"] = worst_case(model, tokenizer, forget, **answering)
    found: dict[str, dict[str, float]] = {}
    if settings.robustness:
        rate = settings.relearn_rate
        found = curves(model, tokenizer, benchmark, per_example, learning_rate=rate, **answering)
        found |= durability.curves(model, tokenizer, forget, **how)
    return Measurement(per_example, found, general)


def _read(file: Path) -> Measurement | None:
    """A measurement from the cache; None if there is none, it is damaged, or another version wrote it."""

    def current(value: dict[str, Any]) -> dict[str, Any]:
        if value.get("format") != Measurement.format:
            raise SchemaError(f"expected format {Measurement.format}, found {value.get('format')!r:.40}")
        return value

    try:
        return schema.read(Measurement, file, current)
    except (FileError, SchemaError):
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
