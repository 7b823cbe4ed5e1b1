"""The unlearning objectives: plain functions of what a forward pass gives.

Every objective is γ · L_forget + α · L_retain. A loss is a function; the names of its positional parameters say what it needs,
and the one training loop (`trainer`) provides exactly that:

    logits, targets       (B, T, V) and (B, T): logits at position t predict targets[:, t]; `IGNORED` where nothing counts
    hidden                (B, T, H): hidden states after the layer that the hyper-parameter `layer` names, same positions
    reference_…           the same under the reference model; reference_nll is NLL(y|x), shape (B,), nats
    alternate_…           the same for the alternate answer of each example
    control               (H,): a random unit vector, the same for all copies and rounds

Keyword-only parameters are hyper-parameters. A loss returns either one number per token, shape (B, T), zero where nothing
counts, or one per example, shape (B,): the objective is their mean over the answer tokens, or over the examples, of an
optimizer step, however that step is spread over micro-batches and processes. Masked positions never count.

A new objective is one function and one line in `OBJECTIVES`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch.nn import functional

from mpunlearn.errors import PlanError
from mpunlearn.lm.examples import IGNORED
from mpunlearn.lm.losses import _at, answer_nll, token_nll
from mpunlearn.protocol.plan import Training

Loss = Callable[..., torch.Tensor]


def grad_ascent(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-CE(D_f) (Maini et al., arXiv 2401.06121; with a retain term GradDiff, Liu et al., arXiv 2203.12817)."""
    return -token_nll(logits, targets)


def npo(logits: torch.Tensor, targets: torch.Tensor, reference_nll: torch.Tensor, *, beta: float) -> torch.Tensor:
    """-(2/β) log σ(β (NLL_θ - NLL_ref)) (Zhang et al., arXiv 2404.05868, equation 3)."""
    return -(2 / beta) * functional.logsigmoid(beta * (answer_nll(logits, targets) - reference_nll))


def dpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    reference_nll: torch.Tensor,
    alternate_logits: torch.Tensor,
    alternate_targets: torch.Tensor,
    alternate_reference_nll: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """-(2/β) log σ(β [(NLL_ref - NLL_θ)(alternate) - (NLL_ref - NLL_θ)(forget)]).

    Rafailov et al., arXiv 2305.18290, equation 7, with refusals preferred over the forget answers (Maini et al., arXiv
    2401.06121); AltPO (Mekala et al., arXiv 2409.13474) is the same with plausible alternatives. Each example keeps its
    alternate for a whole epoch; OpenUnlearning draws a refusal anew at every look.
    """
    preferred = alternate_reference_nll - answer_nll(alternate_logits, alternate_targets)
    rejected = reference_nll - answer_nll(logits, targets)
    return -(2 / beta) * functional.logsigmoid(beta * (preferred - rejected))


def simnpo(logits: torch.Tensor, targets: torch.Tensor, *, beta: float, delta: float) -> torch.Tensor:
    """-(2/β) log σ(β (NLL_θ / |y| - δ)) (Fan et al., arXiv 2410.07163, equation 4)."""
    mean = answer_nll(logits, targets) / (targets != IGNORED).sum(dim=1).clamp(min=1)
    return -(2 / beta) * functional.logsigmoid(beta * (mean - delta))


def undial(logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Soft cross-entropy to softmax(reference logits - β · onehot(y)) (Dong et al., arXiv 2402.10052).

    A mean over answer tokens. OpenUnlearning's averages over prompt and padding too, and indexes the vocabulary with -100
    there.
    """
    counted = targets != IGNORED
    aim = reference_logits[counted].float()
    aim = aim - beta * functional.one_hot(targets[counted], aim.shape[-1])
    return _at(counted, functional.cross_entropy(logits[counted].float(), aim.softmax(dim=-1), reduction="none"))


def satimp(logits: torch.Tensor, targets: torch.Tensor, *, beta1: float, beta2: float) -> torch.Tensor:
    """-p^β1 (1-p)^β2 · CE of each token, the weight detached (Yang et al., arXiv 2505.11953, section 4.3)."""
    losses = token_nll(logits, targets)
    p = torch.exp(-losses.detach())
    return -(p**beta1) * (1 - p) ** beta2 * losses


def wga(logits: torch.Tensor, targets: torch.Tensor, *, beta: float) -> torch.Tensor:
    """-p^β · CE of each token, the weight detached (Wang et al., arXiv 2502.19301, equation 10)."""
    losses = token_nll(logits, targets)
    return -torch.exp(-beta * losses.detach()) * losses


def ce_u(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy to the model's own distribution without the true token, detached (Yang, arXiv 2503.01224, equation 4).

    The first answer token is left out by `skip_tokens`, as that paper's footnote on its training settings has it.
    """
    counted = targets != IGNORED
    chosen = logits[counted].float()
    aim = chosen.detach().scatter(1, targets[counted].unsqueeze(1), float("-inf")).softmax(dim=-1)
    return _at(counted, functional.cross_entropy(chosen, aim, reduction="none"))


def pdu(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(max logit - mean logit)² of each token: its minimum is the uniform prediction (arXiv 2506.05314, equation 3).

    Taken where answer tokens are predicted; OpenUnlearning's takes the positions of the answer tokens themselves, which is
    one later.
    """
    counted = targets != IGNORED
    chosen = logits[counted].float()
    return _at(counted, (chosen.amax(dim=-1) - chosen.mean(dim=-1)) ** 2)


def rmu(hidden: torch.Tensor, targets: torch.Tensor, control: torch.Tensor, *, steering: float) -> torch.Tensor:
    """Mean squared distance of the hidden states to steering · control (Li et al., arXiv 2403.03218, equation 1).

    A mean over the tokens of each example. The control vector lives in the residual space: with a reparameterization that
    turns that space (`full`), every copy is steered elsewhere in the server's own coordinates.
    """
    return _example_mean((hidden.float() - steering * control).square().mean(dim=-1), targets)


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """CE(D_r): the retain answers stay as likely as they were learned."""
    return token_nll(logits, targets)


def kl(logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ model) of each answer token's prediction, in nats (Maini et al., arXiv 2401.06121, section 3).

    OpenUnlearning's adds up prompt and padding too, and divides by the number of examples and positions alike.
    """
    counted = targets != IGNORED
    mine = logits[counted].float().log_softmax(dim=-1)
    reference = reference_logits[counted].float().log_softmax(dim=-1)
    return _at(counted, (reference.exp() * (reference - mine)).sum(dim=-1))


def same_hidden(hidden: torch.Tensor, targets: torch.Tensor, reference_hidden: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the hidden states to the reference model's (RMU's own retain loss, equation 2)."""
    return _example_mean((hidden.float() - reference_hidden.float()).square().mean(dim=-1), targets)


def _example_mean(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    counted = targets != IGNORED
    return (values * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class Objective:
    """A forget loss, how it is weighed against a retain loss, and the defaults of both."""

    forget_loss: Loss
    gamma: float = 1.0
    alpha: float = 1.0
    """0: no retain term, and no retain set is needed."""
    retain_loss: str = "nll"
    """One of `RETAIN_LOSSES`."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Hyper-parameters by name. The forget loss takes those that it names; the loop takes `layer`, and those of `combine`."""
    combine: Literal["sum", "normalized", "dual"] = "sum"
    """How the two gradients become one: see `trainer`."""
    skip_tokens: int = 0
    """First answer tokens of each forget example that carry no loss."""
    refusals: bool = False
    """Whether refusals stand in where the data name no alternate answers."""

    @property
    def needs(self) -> frozenset[str]:
        """What the forget loss takes of a batch."""
        return _needs(self.forget_loss)

    @property
    def retain_needs(self) -> frozenset[str]:
        """What the retain loss takes of a batch; empty without a retain term."""
        return _needs(RETAIN_LOSSES[self.retain_loss]) if self.alpha else frozenset()

    @property
    def alternates(self) -> bool:
        """Whether forget examples need alternate answers."""
        return "alternate_logits" in self.needs

    @property
    def reference_model(self) -> bool:
        """Whether the reference model itself is needed, not only its log-likelihoods."""
        return bool((self.needs | self.retain_needs) & {"reference_logits", "reference_hidden"})

    def forget(self, **given: torch.Tensor) -> torch.Tensor:
        """The forget loss with this objective's hyper-parameters."""
        wanted = inspect.signature(self.forget_loss).parameters
        return self.forget_loss(**given, **{name: self.parameters[name] for name in self.parameters if name in wanted})

    def retain(self, **given: torch.Tensor) -> torch.Tensor:
        """The retain loss."""
        return RETAIN_LOSSES[self.retain_loss](**given)


def _needs(loss: Loss) -> frozenset[str]:
    parameters = inspect.signature(loss).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY)


RETAIN_LOSSES: dict[str, Loss] = {"nll": nll, "kl": kl, "hidden": same_hidden}
"""Every retain loss by its name on the command line."""
OBJECTIVES: dict[str, Objective] = {
    "grad-ascent": Objective(grad_ascent, alpha=0.0),
    "grad-diff": Objective(grad_ascent),
    "npo": Objective(npo, parameters={"beta": 0.1}),
    "dpo": Objective(dpo, parameters={"beta": 0.1}, refusals=True),
    "simnpo": Objective(simnpo, gamma=0.125, parameters={"beta": 4.5, "delta": 0.0}),
    "undial": Objective(undial, alpha=0.0, parameters={"beta": 10.0}),
    "satimp": Objective(satimp, gamma=0.1, parameters={"beta1": 5.0, "beta2": 1.0}),
    "wga": Objective(wga, parameters={"beta": 1.0}),
    "ngdiff": Objective(grad_ascent, combine="normalized", parameters={"adapt_every": 10}),
    "rmu": Objective(rmu, retain_loss="hidden", parameters={"steering": 2.0, "layer": 7}),
    "ce-u": Objective(ce_u, alpha=0.0, skip_tokens=1),
    "pdu": Objective(pdu, combine="dual", parameters={"retain_target": 0.3, "dual_step": 1.0, "dual_warmup": 5}),
    "altpo": Objective(dpo, parameters={"beta": 0.1}),
}
"""Every objective by its name on the command line. Defaults are OpenUnlearning's (arXiv 2506.12618), or the papers'."""


def resolve(training: Training) -> Objective:
    """The objective with the hyper-parameters that the training overrides.

    Raises:
        PlanError: there is no objective of that name, or it has no such hyper-parameter.
    """
    if training.objective not in OBJECTIVES:
        raise PlanError(f"--objective: expected one of {', '.join(OBJECTIVES)}, found {training.objective}")
    objective = OBJECTIVES[training.objective]
    for name, value in training.parameters.items():
        if name not in objective.parameters:
            raise PlanError(f"--{name.replace('_', '-')}: {training.objective} has no such hyper-parameter")
        if name == "beta" and value <= 0:
            raise PlanError(f"--beta: expected a number above 0, found {value:g}")
    if training.retain_loss is not None and training.retain_loss not in RETAIN_LOSSES:
        raise PlanError(f"--retain-loss: expected one of {', '.join(RETAIN_LOSSES)}, found {training.retain_loss}")
    if training.retain_loss == "hidden" and "layer" not in objective.parameters:
        raise PlanError(
            f"--retain-loss hidden: only rmu names the layer that it compares; {training.objective} does not"
        )
    names = ("gamma", "alpha", "retain_loss", "skip_tokens")
    given = {name: getattr(training, name) for name in names if getattr(training, name) is not None}
    objective = replace(objective, **given, parameters={**objective.parameters, **training.parameters})
    if objective.combine != "sum" and not objective.alpha:
        raise PlanError(f"--alpha 0: {training.objective} is made of a forget and a retain gradient, it needs both")
    return objective
