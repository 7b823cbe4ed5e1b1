"""From what was measured on one or more models to metrics, intervals and comparisons. Everything here takes seconds."""

from collections.abc import Mapping
from typing import Any

from mpunlearn.evaluation import durability, named, tofu
from mpunlearn.evaluation.bootstrap import CONFIDENCE, EVERYTHING, RESAMPLES, SEED, Resampled, Sample, intervals
from mpunlearn.evaluation.compare import Compared
from mpunlearn.evaluation.definitions import DEFINITIONS
from mpunlearn.evaluation.measurement import Benchmark, Measurement, Settings

BOOTSTRAP = {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": SEED}
"""How intervals are computed."""


def summarize(
    benchmark: Benchmark,
    measurement: Measurement,
    retrained: Measurement | None,
    original: Measurement | None,
    settings: Settings,
) -> dict[str, float]:
    """The metrics of a model, by name.

    Args:
        benchmark: what the model was measured on.
        measurement: the model's measurement.
        retrained: that of the model that never saw the forget set; forget quality, PrivLeak, UDS and scores need it.
        original: that of the model before unlearning; the overall score needs it.
        settings: how all of them were measured.
    """
    own = over(EVERYTHING, benchmark, measurement, retrained, original, settings)
    scores = durability.scores(measurement.robustness, None if retrained is None else retrained.robustness)
    return {**own, **scores, **measurement.general}


def over(
    sample: Sample,
    benchmark: Benchmark,
    measurement: Measurement,
    retrained: Measurement | None,
    original: Measurement | None,
    settings: Settings,
) -> dict[str, Any]:
    """Those metrics that are computed from examples, over a sample of them; the other arguments are those of `summarize`.

    Returns:
        Numbers or, for resamples, arrays of shape (B,).
    """
    other, before = (None if model is None else model.per_example for model in (retrained, original))
    definitions = DEFINITIONS[settings.definitions]
    if isinstance(benchmark, named.Named):
        return named.summarize(benchmark, measurement.per_example, other, sample, definitions)
    return tofu.summarize(measurement.per_example, other, before, sample, definitions)


def compared(
    benchmark: Benchmark,
    own: Measurement,
    others: Mapping[str, tuple[str, Measurement]],
    retrained: Measurement | None,
    original: Measurement | None,
    settings: Settings,
) -> tuple[dict[str, list[float]], dict[str, Compared]]:
    """The intervals of a model's metrics, and the checkpoints that are compared with it.

    Args:
        benchmark: what the models were measured on.
        own: the model's measurement.
        others: name → digest and measurement of the other checkpoints. Every model is resampled alike.
        retrained: as for `summarize`.
        original: as for `summarize`.
        settings: as for `summarize`.
    """
    sample = Resampled()
    resampled = over(sample, benchmark, own, retrained, original, settings)
    found = {}
    for name, (digest, other) in others.items():
        values = over(sample, benchmark, other, retrained, original, settings)
        found[name] = Compared(
            metrics=summarize(benchmark, other, retrained, original, settings),
            intervals=intervals(values),
            differences=intervals({key: values[key] - resampled[key] for key in values if key in resampled}),
            per_example=other.per_example,
            digest=digest,
        )
    return intervals(resampled), found
