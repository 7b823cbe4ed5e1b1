"""The command `push`: uploads an unlearned model to the Hugging Face Hub, with a model card that says how it was made.

It is a command of its own and no option of `run`, so that a run cannot fail at its end because of the network, and so
that the card can report an evaluation and an audit, which come after the run. Only files that belong to a checkpoint
are uploaded, in one commit.

Not covered: updating the metadata of a card that was edited by hand, which this replaces.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import FileError, NetworkError, PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path, read_json
from mpunlearn.progress import say

if TYPE_CHECKING:
    from mpunlearn.server.plan import RunPlan

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


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
        audit: JSON files of `audit`, `extract` or `client audit`, for their figures. The parameter error that `audit` finds is
            close to the level of the common noise.
        record: The number of the run's record (default: that of the record in the run's directory).
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
    needs("client", "push")
    from mpunlearn.checkpoint import Checkpoint, checkpoint_files
    from mpunlearn.hub.card import model_card
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
    record = record or (_record_number(folder) if plan is not None else None)
    card = model_card(repository, plan, evaluations, audits, record=record, base_model=base_model, license=license)
    files["README.md"] = card.encode()
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}
    url = "" if dry_run else _upload(repository, files, private)
    return Pushed(repository, url, sizes, card)


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


def _record_number(folder: Path) -> str | None:
    """The number of a run's record; None if it has none."""
    from mpunlearn.protocol.record.bundle import Bundle
    from mpunlearn.protocol.record.log import FILE

    bundles = [Bundle.read(path) for path in sorted(folder.rglob(FILE))]
    return f"mpu:{bundles[0].merged(*bundles[1:]).number}" if bundles else None


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
    from mpunlearn.hub.card import figures

    file = as_path(path, option)
    content = read_json(file)
    if needed and not isinstance(content.get(needed), dict):
        raise FileError(f"{option} {file}: has no {needed}; give a file that `mpunlearn evaluate --out` wrote")
    if not needed and not figures(content):
        raise FileError(f"{option} {file}: has no figures of an audit; give the --json output of an audit")
    return content


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
