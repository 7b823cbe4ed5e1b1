"""The model card of an unlearned model: how it was made, what was measured, and what that does not say.

It has the plan that both parties know, metrics, and audit figures. It never has examples, digests of the forget set,
paths, or the levels of the noise, which are the server's secret. Of a report, only numbers and their names are taken
over.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpunlearn.tables import markdown

if TYPE_CHECKING:
    from mpunlearn.server.plan import RunPlan

_DATASETS = {
    "tofu": ("locuslab/TOFU", "TOFU"),
    "muse/news": ("muse-bench/MUSE-News", "MUSE News"),
    "muse/books": ("muse-bench/MUSE-Books", "MUSE Books"),
    "wmdp/bio": ("cais/wmdp", "WMDP biology"),
    "wmdp/cyber": ("cais/wmdp", "WMDP cybersecurity"),
    "wmdp/chem": ("cais/wmdp", "WMDP chemistry"),
    "knowundo/privacy": ("zjunlp/KnowUnDo", "KnowUnDo privacy"),
    "knowundo/copyright": ("zjunlp/KnowUnDo", "KnowUnDo copyright"),
}
"""Benchmark → its repository on the Hub, and its name. RWKU is not here: its target is the person to forget."""
_NAME = re.compile(r"[A-Za-z0-9_. -]{1,60}")
"""Names of metrics that are taken over from a file."""
LIMITS = """\
- Unlearning by training suppresses what a model says. It is no proof that the information is gone: other questions, further
  training and quantization can bring some of it back.
- The metrics above hold for the sets that they were measured on, and say nothing about others.
- Whoever has the model before and after unlearning can learn something about the forgotten texts from the difference.
"""


def model_card(
    repository: str,
    plan: "RunPlan | None",
    evaluations: Sequence[Mapping[str, Any]],
    audits: Sequence[Mapping[str, Any]],
    *,
    record: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The model card as text, with metadata that the Hub reads.

    Args:
        repository: OWNER/NAME.
        plan: the plan of the run; None if it is not known.
        evaluations: the content of files that `evaluate` wrote.
        audits: the content of reports of audits.
        record: the number of the record of the run.
        base_model: the model that was unlearned, OWNER/NAME.
        license: the license, as the Hub names it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = repository.partition("/")[2]
    results = [result for evaluation in evaluations for result in _results(evaluation)]
    data = ModelCardData(
        base_model=base_model,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", "mpunlearn", *([plan.training.objective] if plan is not None else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    of = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    parts = [
        f"# {name}\n\nAn unlearned version{of}, made with mpunlearn, which implements Multiple Perturbed Copies Unlearning "
        "([arXiv 2602.23798](https://arxiv.org/abs/2602.23798)).",
        *([f"Record of the run: `{_plain(record)}`"] if record else []),
        *(["## How it was made\n\n" + _made(plan)] if plan is not None else []),
        "## What it still knows\n\n" + ("\n\n".join(map(_metrics, evaluations)) or "It was not evaluated."),
        *(["## What the run disclosed\n\n" + "\n\n".join(map(_figure_table, audits))] if audits else []),
        "## Limits\n\n" + LIMITS.rstrip(),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _made(plan: "RunPlan") -> str:
    """The part of a run's plan that both parties know, as a table."""
    training = plan.training
    objective = training.resolved()
    rows = {
        "objective": training.objective,
        "rounds": plan.rounds,
        "copies": plan.perturbation.copies,
        "epochs in each round": training.epochs,
        "learning rate": training.learning_rate,
        "batch size": training.batch_size,
        "optimizer": training.optimizer,
        "weight of the forget loss": objective.gamma,
        "weight of the retain loss": objective.alpha,
        **objective.parameters,
        "trained weights": training.train,
    }
    if objective.alpha:
        rows["retain loss"] = objective.retain_loss
    if training.lora_rank:
        rows["LoRA rank"] = training.lora_rank
    cells = [(name, f"{value:g}" if isinstance(value, float) else _plain(str(value))) for name, value in rows.items()]
    return markdown(("option", "value"), cells)


def _benchmark(evaluation: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """The dataset of an evaluation on the Hub, its name, and its split. A folder of the owner is not named."""
    provenance = evaluation.get("provenance")
    benchmark = provenance.get("benchmark") if isinstance(provenance, dict) else None
    if benchmark not in _DATASETS:
        return "custom", "own data", None
    split = provenance.get("forget_split") if isinstance(provenance, dict) else None
    return *_DATASETS[benchmark], str(split) if split and _NAME.fullmatch(str(split)) else None


def _finite(values: Any) -> dict[str, float]:
    """The entries of a JSON object whose value is a finite number and whose name is plain."""
    if not isinstance(values, dict):
        return {}
    return {
        name: float(value)
        for name, value in values.items()
        if _NAME.fullmatch(name)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def _results(evaluation: Mapping[str, Any]) -> list[Any]:
    """The metrics of an evaluation, as the Hub reads them."""
    from huggingface_hub import EvalResult

    kind, name, split = _benchmark(evaluation)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=name,
            dataset_config=split,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in _finite(evaluation["metrics"]).items()
    ]


def _metrics(evaluation: Mapping[str, Any]) -> str:
    """The metrics of an evaluation as a table, next to those of the retrained model if there is one."""
    _, name, split = _benchmark(evaluation)
    retrained = _finite(evaluation.get("retrained"))
    header = ("metric", "this model", *(["retrained without the data"] if retrained else []))
    rows = [
        (metric, f"{value:.4g}", *([f"{retrained[metric]:.4g}" if metric in retrained else ""] if retrained else []))
        for metric, value in _finite(evaluation["metrics"]).items()
    ]
    return f"On {name}{f', {split}' if split else ''}:\n\n{markdown(header, rows)}"


def figures(audit: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a report of `audit`, `client audit` or `extract`."""
    attacks, strongest = audit.get("attacks"), audit.get("strongest")
    if isinstance(attacks, dict) and isinstance(attacks.get(strongest), dict):
        score = _finite(attacks[strongest])
        found = {
            "copies attacked": audit.get("copies"),
            "rounds attacked": audit.get("rounds"),
            "parameter error left to the client": score.get("error"),
            "announced floor": audit.get("floor"),
            "share of weights equal in bfloat16": score.get("equal_bfloat16"),
        }
        return _finite(found)
    if isinstance(audit.get("candidates"), dict):
        return figures(audit["candidates"])
    return _finite(audit.get("metrics"))


def _figure_table(audit: Mapping[str, Any]) -> str:
    return markdown(("figure", "value"), [(name, f"{value:.4g}") for name, value in figures(audit).items()])


def _plain(text: str) -> str:
    """A text that cannot break a table or a code span."""
    return re.sub(r"[|`\s]+", " ", text).strip()
