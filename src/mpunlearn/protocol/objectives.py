"""The unlearning objectives as both parties agree on them: names, weights and hyper-parameters.

Every objective is γ · L_forget + α · L_retain. The loss functions are in `client.objectives`; only the client needs them. What
is here is what a training plan can name, so the server can check a plan, and the command line can explain it, without a
training library.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ObjectiveName = Literal[
    "grad-ascent",
    "grad-diff",
    "npo",
    "dpo",
    "simnpo",
    "undial",
    "satimp",
    "wga",
    "ngdiff",
    "rmu",
    "ce-u",
    "pdu",
    "altpo",
]
RetainLoss = Literal["nll", "kl", "hidden"]


@dataclass(frozen=True)
class Objective:
    """A forget loss, how it is weighed against a retain loss, and the defaults of both."""

    forget_loss: str
    """Name of a function in `client.objectives`."""
    gamma: float = 1.0
    """Weight γ of the forget loss."""
    alpha: float = 1.0
    """Weight α of the retain loss. 0: no retain term, and no retain set is needed."""
    retain_loss: RetainLoss = "nll"
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Hyper-parameters by name, each described in `HYPERPARAMETERS`."""
    combine: Literal["sum", "normalized", "dual"] = "sum"
    """How the forget and the retain gradient become one: see `client.combine`."""
    skip_tokens: int = 0
    """Number of leading answer tokens of each forget example that carry no loss."""
    refusals: bool = False
    """Whether a refusal is the alternate answer where the data name none."""


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "grad-ascent": Objective("grad_ascent", alpha=0.0),
    "grad-diff": Objective("grad_ascent"),
    "npo": Objective("npo", parameters={"beta": 0.1}),
    "dpo": Objective("dpo", parameters={"beta": 0.1}, refusals=True),
    "simnpo": Objective("simnpo", gamma=0.125, parameters={"beta": 4.5, "delta": 0.0}),
    "undial": Objective("undial", alpha=0.0, parameters={"beta": 10.0}),
    "satimp": Objective("satimp", gamma=0.1, parameters={"beta1": 5.0, "beta2": 1.0}),
    "wga": Objective("wga", parameters={"beta": 1.0}),
    "ngdiff": Objective("grad_ascent", combine="normalized", parameters={"adapt_every": 10}),
    "rmu": Objective("rmu", retain_loss="hidden", parameters={"steering": 2.0, "layer": 7}),
    "ce-u": Objective("ce_u", alpha=0.0, skip_tokens=1),
    "pdu": Objective("pdu", combine="dual", parameters={"retain_target": 0.3, "dual_step": 1.0, "dual_warmup": 5}),
    "altpo": Objective("dpo", parameters={"beta": 0.1}),
}
"""Every objective by name. Defaults are OpenUnlearning's (arXiv 2506.12618) or the papers'."""

HYPERPARAMETERS: dict[str, tuple[type[int] | type[float], str]] = {
    "beta": (
        float,
        "Inverse temperature of npo, dpo, simnpo and altpo; shift of the true token's logit for undial; exponent of the "
        "token probability for wga.",
    ),
    "delta": (float, "Margin of simnpo, in nats per token."),
    "beta1": (float, "Exponent of the token probability p for satimp."),
    "beta2": (float, "Exponent of 1 - p for satimp."),
    "adapt_every": (int, "Optimizer steps between two adjustments of ngdiff's learning rate."),
    "steering": (float, "Length of the random vector that rmu steers hidden states to."),
    "layer": (int, "Layer whose hidden states rmu steers, counted from 0."),
    "retain_target": (float, "Retain loss that pdu tries to stay below, in nats per token."),
    "dual_step": (float, "Step size of pdu's dual variable."),
    "dual_warmup": (int, "Epochs, over the whole run, before pdu's dual variable moves."),
}
"""Type and meaning of every hyper-parameter, for the command line and for checks."""
