"""The benchmarks that have a form of their own: which name is read by which module, and measured by which.

TOFU, and folders in its format, are `sets` and `tofu`. Every other benchmark is a module that reads its examples into a
frozen dataclass, measures a model on them, and summarizes what it measured. The functions here give them one interface.
Only MUSE has definitions that differ (see `definitions`), and metrics that need a retrained model.
"""

from typing import Any

from mpunlearn.evaluation import knowundo, muse, rwku, wmdp
from mpunlearn.evaluation.bootstrap import Sample
from mpunlearn.evaluation.definitions import Definitions
from mpunlearn.evaluation.tofu import PerExample
from mpunlearn.lm.sources import Data

Named = muse.MuseSets | wmdp.WmdpQuestions | rwku.RwkuSets | knowundo.KnowUnDoSets
"""The examples of a benchmark."""


def read(benchmark: str, data: Data) -> Named:
    """The examples of a benchmark that `is_named`; errors as in its module."""
    if benchmark in muse.BENCHMARKS:
        return muse.read_muse(benchmark, data)
    if benchmark in wmdp.SUBJECTS:
        return wmdp.read(benchmark, data)
    if benchmark in knowundo.BENCHMARKS:
        return knowundo.read(benchmark, data)
    return rwku.read(benchmark, data)


def is_named(benchmark: str) -> bool:
    """Whether a name is that of a benchmark of a form of its own."""
    first, *rest = benchmark.split("/")
    known = (*muse.BENCHMARKS, *wmdp.SUBJECTS, *knowundo.BENCHMARKS)
    return benchmark in known or (first == "rwku" and len(rest) == 1 and bool(rest[0]))


def measure(model: Any, tokenizer: Any, sets: Named, batch_size: int | None, definitions: Definitions) -> PerExample:
    """The values for every example under one model."""
    if isinstance(sets, muse.MuseSets):
        return muse.measure(model, tokenizer, sets, batch_size, definitions)
    if isinstance(sets, wmdp.WmdpQuestions):
        return wmdp.measure(model, tokenizer, sets, batch_size)
    if isinstance(sets, rwku.RwkuSets):
        return rwku.measure(model, tokenizer, sets, batch_size)
    return knowundo.measure(model, tokenizer, sets, batch_size)


def summarize(
    sets: Named, per_example: PerExample, retrained: PerExample | None, sample: Sample, definitions: Definitions
) -> dict[str, Any]:
    """The benchmark's metrics, by name, as numbers or, for resamples, arrays of shape (B,)."""
    if isinstance(sets, muse.MuseSets):
        return muse.summarize(per_example, retrained, sample, definitions)
    if isinstance(sets, wmdp.WmdpQuestions):
        return wmdp.summarize(per_example, sample)
    if isinstance(sets, rwku.RwkuSets):
        return rwku.summarize(per_example, sample)
    return knowundo.summarize(per_example, sample)
