"""What a report shows, as dataclasses.

Two things are never mixed: what is private to one party is not a field of the other party's side. `ServerSide` has no
field for text and none for the client's data; `ClientSide` has none for the noise. Numbers that were measured for a model
are on both.
"""

from dataclasses import dataclass, field
from typing import Literal

from mpunlearn.schema import older

ORIGINAL, THIS_RUN, RETRAINED = "original", "run", "retrained"
"""Labels with a meaning: the model before unlearning, the run's model, and the model that never saw the forget set."""


@dataclass(frozen=True)
class TrainingPlan:
    """How the client trained; both parties know it."""

    objective: str
    epochs: int
    learning_rate: float
    batch_size: int
    optimizer: str = "adamw_torch"
    train: str = "blocks"
    lora_rank: int = 0


@dataclass(frozen=True)
class PublicPlan:
    """What both parties know of a run."""

    rounds: int
    copies: int
    training: TrainingPlan


@dataclass(frozen=True)
class PerturbationPlan:
    """How the server perturbed the model; the client does not know it."""

    copies: int
    kappa: float
    reparameterization: str = "full"
    denoising: str = "harmonic"
    common_noise: float | Literal["auto"] = older(absent=0.0, default="auto")

    @property
    def common(self) -> bool:
        """Whether the copies shared common noise."""
        return self.common_noise == "auto" or self.common_noise > 0


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one model."""

    label: str
    metrics: dict[str, float]
    round: int | None = None
    """The round after which the model was evaluated; None for a model that is not one of a series."""
    examples: int | None = None
    """Number of forget examples."""


@dataclass(frozen=True)
class AttackScore:
    """How close an attack on the copies came to the server's model."""

    error: float
    equal_bfloat16: float
    equal_float32: float
    exposed: str
    exposed_bfloat16: float


@dataclass(frozen=True)
class BehaviorScore:
    """How close a model comes to the server's as a function."""

    probability: float


@dataclass(frozen=True)
class ModelAudit:
    """What `mpunlearn audit` found."""

    copies: int
    rounds: int
    attacks: dict[str, AttackScore]
    baselines: dict[str, AttackScore]
    behaviors: dict[str, BehaviorScore]
    floor: float | None = None
    holds: bool | None = None
    trusted: bool = True


@dataclass(frozen=True)
class Separation:
    """How well a score tells the forget set from other texts."""

    auc: float
    tpr: float


@dataclass(frozen=True)
class TokenLeak:
    """How well a part of the update names the tokens of the forget set."""

    auc: float
    precision: float
    chance: float


@dataclass(frozen=True)
class SpellingLeak:
    """What the weights of one layer spell out."""

    label: str
    exact: float


@dataclass(frozen=True)
class TextAudit:
    """What `mpunlearn client audit` found."""

    updates: int
    separations: dict[str, dict[str, Separation]]
    tokens: dict[str, TokenLeak]
    spelling: list[SpellingLeak]


@dataclass(frozen=True)
class Losses:
    """The probability of the forget answers on one of the client's copies."""

    round: int
    copy: int
    probability_before: float
    probability_after: float


@dataclass(frozen=True)
class Answer:
    """One question with the answers of the models. It is text of the client."""

    set: str
    question: str
    expected: str
    before: str
    after: str
    retrained: str | None = None


@dataclass(frozen=True)
class RecordSummary:
    """The record of a run in short. It must not contain text of the forget or the retain set."""

    number: str
    events: tuple[tuple[str, str], ...] = ()
    """What happened, oldest first: a time and a sentence."""
    valid: bool = True
    """Whether signatures and hashes were checked and are right."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServerSide:
    """What the server's page shows."""

    plan: PublicPlan
    perturbation: PerturbationPlan
    model: str
    """Name of the model's directory."""
    finished: bool
    eta: float = 1.0
    base: bool = False
    """Whether noise was relative to a public base."""
    stand_in: bool = False
    """Whether the copies were made of a stand-in."""
    network: bool = False
    """Whether the parties communicated over a network."""
    clients: int = 1
    evaluations: list[Evaluation] = field(default_factory=list)
    audit: ModelAudit | None = None


@dataclass(frozen=True)
class ClientSide:
    """What the client's page shows."""

    plan: PublicPlan | None
    """None if only the digests of the client's data are known."""
    digests: dict[str, str]
    """Which data → its SHA-256."""
    network: bool = False
    finished: bool = True
    evaluations: list[Evaluation] = field(default_factory=list)
    losses: list[Losses] = field(default_factory=list)
    audit: TextAudit | None = None
    answers: list[Answer] = field(default_factory=list)
