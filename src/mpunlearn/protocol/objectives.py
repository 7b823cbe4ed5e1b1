"""The unlearning objectives that a training plan can name: their losses, weights and hyperparameters.

Every objective is γ · L_forget + α · L_retain. The loss functions are in `client.objectives`, because only the client
needs them. This module has no training dependencies, so the server can validate a plan and the command line can
document it.
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
    "jensun",
    "repselect",
]
RetainLoss = Literal["nll", "kl", "jsd", "hidden"]


@dataclass(frozen=True)
class Objective:
    """A forget loss, a retain loss, their weights, and the default hyperparameters."""

    forget_loss: str
    """Name of a function in `client.objectives`."""
    gamma: float = 1.0
    """Weight γ of the forget loss."""
    alpha: float = 1.0
    """Weight α of the retain loss. If 0, there is no retain term and no retain set is needed."""
    retain_loss: RetainLoss = "nll"
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Default hyperparameters by name; `HYPERPARAMETERS` describes them."""
    combine: Literal["sum", "normalized", "dual", "collapsed"] = "sum"
    """How the forget gradient and the retain gradient are combined (see `client.combine`)."""
    skip_tokens: int = 0
    """Number of leading answer tokens of each forget example that are excluded from the loss."""
    refusals: bool | str = False
    """Whether a refusal serves as the alternate answer if the data provide none. A text is that refusal."""


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
    "jensun": Objective("jensun", retain_loss="jsd", refusals="No idea"),
    "repselect": Objective("grad_ascent", alpha=0.0, combine="collapsed", parameters={"components": 512, "soft": 1}),
}
"""All objectives by name. Defaults are those of OpenUnlearning (arXiv 2506.12618) or of the original papers."""

HYPERPARAMETERS: dict[str, tuple[type[int] | type[float], str]] = {
    "beta": (
        float,
        "Inverse temperature for npo, dpo, simnpo and altpo; amount subtracted from the logit of the true token for "
        "undial; exponent of the token probability for wga.",
    ),
    "delta": (float, "Margin for simnpo, in nats per token."),
    "beta1": (float, "Exponent of the token probability p for satimp."),
    "beta2": (float, "Exponent of 1 - p for satimp."),
    "adapt_every": (int, "Optimizer steps between two adjustments of the learning rate by ngdiff."),
    "steering": (float, "Norm of the random vector that rmu steers hidden states toward."),
    "layer": (int, "Layer whose hidden states rmu steers, starting at 0."),
    "retain_target": (float, "Upper bound that pdu imposes on the retain loss, in nats per token."),
    "dual_step": (float, "Step size of the dual variable for pdu."),
    "dual_warmup": (int, "Number of epochs, over all rounds, before pdu updates its dual variable."),
    "components": (
        int,
        "Number of leading principal components of each weight's gradient that repselect collapses, at most half of the "
        "gradient's rank; 0 collapses none.",
    ),
    "soft": (int, "1 if repselect damps the leading principal components, 0 if it removes them."),
}
"""Type and description of every hyperparameter, for validation and for the command line."""
