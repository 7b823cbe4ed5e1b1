"""The data owner's limits on what a server may ask for.

A job is a request from another party. Before anything is downloaded, it is checked against a policy file that the data
owner writes. The defaults let an honest server work, and keep a dishonest one from learning more by asking for more:
they limit the number of rounds and copies, and allow no update of the embeddings and no access to files on this
machine. Tables of the file bound the training plan (`bounds`), say what model it has to be (`pins`), what a copy has to
look like (`client.plausibility`), and what the process that handles it may use (`process`). A policy can also limit what
the updates themselves would tell the server; they are then audited before they are sent (see `auditing`).
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from mpunlearn.client.audit.report import NEEDS
from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.pins import ModelPolicy
from mpunlearn.client.network.process import ProcessLimits
from mpunlearn.client.plausibility.report import Limits
from mpunlearn.errors import PlanError, SchemaError
from mpunlearn.protocol.identity import HEX
from mpunlearn.protocol.messages import Job
from mpunlearn.protocol.plan import Training
from mpunlearn.protocol.transfer import redact
from mpunlearn.requirements import Requirement, parse_requirements
from mpunlearn.schema import parse

AUDIT_OPTION = "policy: audit: require"
"""What error messages call the limits of the audit."""


@dataclass(frozen=True)
class AuditPolicy:
    """What every update has to meet before it is sent: the table [audit] of policy.toml.

    Raises:
        PlanError: a requirement is not of the right form, or limits something unknown.
    """

    require: list[str]
    """Limits on what an update would tell the server, such as membership-auc<0.7; see `client.audit`."""
    reference: str | None = None
    """Texts of the same kind that the model knows and that are not trained on."""
    near: str | None = None
    """Texts on the same subjects as the forget set that are not trained on."""

    def __post_init__(self) -> None:
        self.requirements()

    def requirements(self) -> list[Requirement]:
        """The limits."""
        return parse_requirements(",".join(self.require), NEEDS, AUDIT_OPTION)


@dataclass(frozen=True)
class Policy:
    """The limits: the fields of policy.toml.

    Raises:
        PlanError: a value is out of range.
    """

    server_key: str
    """The server's public key, 64 hexadecimal digits. Messages signed with any other key are ignored."""
    objectives: list[str] | None = None
    """Allowed objectives (default: all)."""
    train: list[str] | None = None
    """Allowed values of --train (default: only blocks, since an update of the embeddings reveals which tokens the forget
    set contains)."""
    token_local: bool = False
    """Whether the token-local weights may be trained, whose update reveals the same."""
    max_copies: int = 8
    """Maximum number of copies per round."""
    max_rounds: int = 20
    """Maximum number of rounds."""
    max_epochs: int = 20
    """Maximum number of epochs per round."""
    max_megabytes: float = 64_000.0
    """Maximum size of one copy, in MB."""
    stores: list[str] | None = None
    """Prefixes of URLs that files may be downloaded from and uploaded to (default: none; files travel in messages)."""
    review: bool = False
    """Whether a person has to review the first copy, so that [model] is filled in, before anything is trained."""
    plan: PlanBounds = field(default_factory=PlanBounds)
    """Bounds of the training plan."""
    model: ModelPolicy | None = None
    """What the model is (default: what the first copy was)."""
    plausibility: Limits = field(default_factory=Limits)
    """What a copy has to look like before the client trains on it."""
    process: ProcessLimits = field(default_factory=ProcessLimits)
    """Memory and time of the process that handles copies."""
    audit: AuditPolicy | None = None
    """What every update has to meet before it is sent (default: updates are not audited)."""

    def __post_init__(self) -> None:
        if not HEX.fullmatch(self.server_key):
            raise PlanError("policy: server_key: expected 64 hexadecimal digits, as in the invitation")
        for name in ("max_copies", "max_rounds", "max_epochs", "max_megabytes"):
            if not getattr(self, name) > 0:
                raise PlanError(f"policy: {name}: expected a number above 0, found {getattr(self, name)}")

    @classmethod
    def read(cls, path: str | Path) -> "Policy":
        """Reads a policy from a TOML file.

        Raises:
            PlanError: it cannot be read, or a field is missing, unknown or of the wrong type.
        """
        try:
            return parse(cls, tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise PlanError(f"--policy {path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"--policy {path}: cannot be read as TOML: {error}") from error
        except SchemaError as error:
            raise PlanError(f"--policy {path}: {error}") from error

    def violations(self, job: Job, begun_by_older: bool = False) -> list[str]:
        """The reasons why a job must not be done; empty if it is allowed.

        Args:
            job: the job.
            begun_by_older: whether a version that always trained the token-local weights began the run. It goes on with
                them, and with its plan, whatever the bounds are.
        """
        reasons = [
            f"{name.replace('_', ' ')} is {limit}, asked for {asked:g}"
            for name, limit, asked in (
                ("max_copies", self.max_copies, job.copies),
                ("max_rounds", self.max_rounds, job.rounds),
                ("max_megabytes", self.max_megabytes, sum(file.size for file in job.files) / 1e6),
            )
            if asked > limit
        ]
        try:
            training = parse(Training, job.training)
        except (SchemaError, PlanError) as error:
            return [*reasons, f"invalid training plan: {error}"]
        if training.epochs > self.max_epochs:
            reasons.append(f"max epochs is {self.max_epochs}, asked for {training.epochs}")
        if self.objectives is not None and training.objective not in self.objectives:
            reasons.append(f"objectives are {', '.join(self.objectives)}, asked for {training.objective}")
        if training.train not in (allowed := self.train or ["blocks"]):
            reasons.append(f"train is {', '.join(allowed)}, asked for {training.train}")
        if not begun_by_older:
            reasons += self.plan.violations(training)
        if training.token_local and not (self.token_local or begun_by_older):
            reasons.append("token local is false, asked for true (or by a server older than version 0.2)")
        for url in [*(file.url for file in job.files if file.url is not None), *job.slots]:
            if ".." in unquote(url) or not any(url.startswith(store.rstrip("/") + "/") for store in self.stores or []):
                reasons.append(f"stores do not include {redact(url)}")
                break
        return reasons
