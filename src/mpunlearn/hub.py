"""The command `push`: uploads an unlearned model to the Hugging Face Hub, with a model card that says how it was made.

It is a command of its own and no option of `run`, so that a run cannot fail at its end because of the network, and so
that the card can report an evaluation and an audit, which come after the run.

The card has the plan that both parties know, metrics, and audit figures. It never has examples, digests of the forget
set, paths, or the levels of the noise, which are the server's secret. Only files that belong to a checkpoint are
uploaded, in one commit.

Not covered: updating the metadata of a card that was edited by hand, which this replaces.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import FileError, NetworkError, PlanError
from mpunlearn.files import as_path, read_json
from mpunlearn.progress import say
from mpunlearn.tables import markdown

if TYPE_CHECKING:
    from mpunlearn.server.plan import RunPlan

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DATASETS = {
    "tofu": ("locuslab/TOFU", "TOFU"),
    "muse/news": ("muse-bench/MUSE-News", "MUSE News"),
    "muse/books": ("muse-bench/MUSE-Books", "MUSE Books"),
}
"""Benchmark → its repository on the Hub, and its name."""
_NAME = re.compile(r"[A-Za-z0-9_. -]{1,60}")
"""Names of metrics that are taken over from a file."""
LIMITS = """\
- Unlearning by training suppresses what a model says. It is no proof that the information is gone: other questions, further
  training and quantization can bring some of it back.
- The metrics above hold for the sets that they were measured on, and say nothing about others.
- Whoever has the model before and after unlearning can learn something about the forgotten texts from the difference.
"""


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be."""

    repository: str
    url: str
    """The address of the commit; empty if nothing was uploaded."""
    files: dict[str, int]
    """Name → size in bytes."""
    card: str

    def text(self) -> str:
        """The address; for a dry run, the card and the files."""
        if self.url:
            return self.url
        files = "\n".join(f"{name}: {size:,} bytes" for name, size in self.files.items())
        return f"{self.card}\n\nNot uploaded (--dry-run):\n{files}"

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return dataclasses.asdict(self)


def push(
    model: str | Path,
    repository: str,
    *,
    evaluation: Sequence[str | Path] = (),
    audit: Sequence[str | Path] = (),
    record: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Uploads an unlearned model to the Hugging Face Hub, with a model card. Log in with `hf auth login` first.

    The card reports the training plan, metrics and audit figures. It contains no examples and no noise levels.

    Args:
        model: The directory of a complete run, or a checkpoint directory.
        repository: The repository, OWNER/NAME. It is created if it does not exist.
        evaluation: Files that `evaluate --out` wrote, for the metrics.
        audit: JSON files of `audit`, `extract` or `client audit`, for their figures.
        record: The number of the record of this run.
        base_model: The model that was unlearned, OWNER/NAME on the Hub.
        license: The license of the model, as the Hub names it, such as apache-2.0.
        private: Create the repository as a private one.
        dry_run: Print the card and the names of the files, and upload nothing.

    Returns:
        What was uploaded.

    Raises:
        FileError: The model or a report cannot be read.
        PlanError: The model is a published copy, or an option has an invalid value.
        NetworkError: The Hub cannot be reached, or refuses the upload.
    """
    from mpunlearn.checkpoint import Checkpoint, checkpoint_files
    from mpunlearn.protocol.exchange import Card

    for option, name in {"repository": repository, "--base-model": base_model}.items():
        if name is not None and not _REPOSITORY.fullmatch(name):
            raise PlanError(f"{option}: expected OWNER/NAME, found {name!r:.60}")
    folder = as_path(model, "model")
    plan = _plan(folder)
    path = folder / "final" if plan is not None else folder
    checkpoint = Checkpoint(path)
    if Card.of(checkpoint.config) is not None:
        raise PlanError(
            f"{path}: is a published copy of a model, not an unlearned model; give the run, or its final model"
        )
    files = {file.name: _content(file) for file in checkpoint_files(path)}
    evaluations = [_read(file, "--evaluation", "metrics") for file in evaluation]
    audits = [_read(file, "--audit") for file in audit]
    card = model_card(repository, plan, evaluations, audits, record=record, base_model=base_model, license=license)
    files["README.md"] = card.encode()
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}
    url = "" if dry_run else _upload(repository, files, private)
    return Pushed(repository, url, sizes, card)


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
        *(["## What it still knows\n\n" + "\n\n".join(map(_metrics, evaluations))] if evaluations else []),
        *(["## What the run disclosed\n\n" + "\n\n".join(map(_figures, audits))] if audits else []),
        "## Limits\n\n" + LIMITS.rstrip(),
    ]
    if not evaluations:
        parts.insert(-1, "It was not evaluated.")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _plan(folder: Path) -> "RunPlan | None":
    """The plan of a run in one process or over a network; None for a directory that is no run.

    Raises:
        FileError: the run is not complete.
    """
    from mpunlearn.server.plan import RunPlan

    for file in (folder / "server" / "plan.json", folder / "plan.json"):
        if file.is_file():
            if not (folder / "final").is_dir():
                raise FileError(f"{folder}: the run is not complete; resume it, and push its final model then")
            return RunPlan.read(file)
    return None


def _content(file: Path) -> bytes | Path:
    """What is uploaded of a file: the file itself, or a configuration without its owner's paths."""
    from mpunlearn.checkpoint import without_paths

    if file.name in ("config.json", "tokenizer_config.json"):
        return (json.dumps(without_paths(read_json(file)), indent=2, ensure_ascii=False) + "\n").encode()
    return file


def _read(path: str | Path, option: str, needed: str = "") -> dict[str, Any]:
    """Reads a report.

    Raises:
        FileError: it is not a JSON object, or not a report of this kind.
    """
    file = as_path(path, option)
    content = read_json(file)
    if needed and not isinstance(content.get(needed), dict):
        raise FileError(f"{option} {file}: has no {needed}; give a file that `mpunlearn evaluate --out` wrote")
    if not needed and not _numbers(content):
        raise FileError(f"{option} {file}: has no figures of an audit; give the --json output of an audit")
    return content


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


def _numbers(audit: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a report of `audit`, `client audit` or `extract`."""
    attacks, strongest = audit.get("attacks"), audit.get("strongest")
    if isinstance(attacks, dict) and isinstance(attacks.get(strongest), dict):
        score = _finite(attacks[strongest])
        figures = {"copies attacked": audit.get("copies"), "rounds attacked": audit.get("rounds")}
        figures |= {"parameter error left to the client": score.get("error"), "announced floor": audit.get("floor")}
        figures |= {"share of weights equal in bfloat16": score.get("equal_bfloat16")}
        return _finite(figures)
    if isinstance(audit.get("candidates"), dict):
        return _numbers(audit["candidates"])
    return _finite(audit.get("metrics"))


def _figures(audit: Mapping[str, Any]) -> str:
    return markdown(("figure", "value"), [(name, f"{value:.4g}") for name, value in _numbers(audit).items()])


def _plain(text: str) -> str:
    """A text that cannot break a table or a code span."""
    return re.sub(r"[|`\s]+", " ", text).strip()


def _upload(repository: str, files: Mapping[str, bytes | Path], private: bool) -> str:
    """Uploads all files in one commit; returns its address.

    Raises:
        NetworkError: the Hub cannot be reached, or refuses the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="mpunlearn")
    added = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    say(f"uploading {len(files)} files to {repository}")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, added, commit_message="Upload an unlearned model")
    except Exception as error:  # errors of the library, and of whichever HTTP client its version uses
        reason = " ".join(str(error).split())
        raise NetworkError(
            f"{repository}: cannot be uploaded: {reason:.300}; check the name, your network, and that `hf auth login` was done"
        ) from error
    return str(commit.commit_url)
