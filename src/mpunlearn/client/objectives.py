"""The losses of the unlearning objectives, as plain functions of the outputs of a forward pass.

The names of a loss's positional parameters say what it needs, and the training loop (`trainer`) provides exactly that:

    logits, targets    (B, T, V) and (B, T): logits at position t predict targets[:, t]; `IGNORED` at masked positions
    hidden             (B, T, H): hidden states at the same positions, after the layer that the hyperparameter `layer`
                       names
    reference_…        the same under the reference model; reference_nll is NLL(y|x), shape (B,), in nats
    alternate_…        the same for the alternate answer of each example; alternate_targets alone needs no forward pass
    control            (H,): a random unit vector, the same for all copies and rounds

Keyword-only parameters are hyperparameters. A loss returns either one number per token, shape (B, T), zero at masked
positions, or one per example, shape (B,). The objective is the mean over all answer tokens, or over all examples, of an
optimizer step, however that step is split into micro-batches and processes.

To add an objective, write its loss here, add it to `FORGET_LOSSES`, and add a line to `protocol.objectives.OBJECTIVES`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from mpunlearn.lm.examples import IGNORED
from mpunlearn.lm.losses import answer_nll, at_positions, token_nll
from mpunlearn.protocol.objectives import Objective

Loss = Callable[..., torch.Tensor]


def grad_ascent(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-CE(D_f) (Maini et al., arXiv 2401.06121). With a retain term it is GradDiff (Liu et al., arXiv 2203.12817)."""
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
    2401.06121). AltPO (Mekala et al., arXiv 2409.13474) is the same with plausible alternate answers. A refusal is
    drawn once for each example and kept; OpenUnlearning draws a new one every time.
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

    The mean is over answer tokens. OpenUnlearning also averages over prompt and padding, where it indexes the
    vocabulary with -100.
    """
    counted = targets != IGNORED
    desired = reference_logits[counted].float()
    desired = desired - beta * functional.one_hot(targets[counted], desired.shape[-1])
    return at_positions(
        counted, functional.cross_entropy(logits[counted].float(), desired.softmax(dim=-1), reduction="none")
    )


def satimp(logits: torch.Tensor, targets: torch.Tensor, *, beta1: float, beta2: float) -> torch.Tensor:
    """-p^β1 (1-p)^β2 · CE of each token, with a detached weight (Yang et al., arXiv 2505.11953, section 4.3)."""
    losses = token_nll(logits, targets)
    p = torch.exp(-losses.detach())
    return -(p**beta1) * (1 - p) ** beta2 * losses


def wga(logits: torch.Tensor, targets: torch.Tensor, *, beta: float) -> torch.Tensor:
    """-p^β · CE of each token, with a detached weight (Wang et al., arXiv 2502.19301, equation 10)."""
    losses = token_nll(logits, targets)
    return -torch.exp(-beta * losses.detach()) * losses


def ce_u(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy to the model's own detached distribution without the true token (Yang, arXiv 2503.01224, equation
    4).

    `skip_tokens` excludes the first answer token, as a footnote on that paper's training settings says.
    """
    counted = targets != IGNORED
    chosen = logits[counted].float()
    desired = chosen.detach().scatter(1, targets[counted].unsqueeze(1), float("-inf")).softmax(dim=-1)
    return at_positions(counted, functional.cross_entropy(chosen, desired, reduction="none"))


def pdu(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(max logit - mean logit)² of each token, minimal for a uniform prediction (arXiv 2506.05314, equation 3).

    Computed at the positions that predict answer tokens. OpenUnlearning uses the positions of the answer tokens
    themselves, one later.
    """
    counted = targets != IGNORED
    chosen = logits[counted].float()
    return at_positions(counted, (chosen.amax(dim=-1) - chosen.mean(dim=-1)) ** 2)


def rmu(hidden: torch.Tensor, targets: torch.Tensor, control: torch.Tensor, *, steering: float) -> torch.Tensor:
    """Mean squared distance of the hidden states from steering · control (Li et al., arXiv 2403.03218, equation 1).

    Computed at the positions that predict answer tokens. OpenUnlearning uses the positions of the answer tokens
    themselves, one later, also in its retain loss (`same_hidden` here). The mean is over the tokens of each example. The
    control vector is in the residual stream. If the reparameterization changes the basis of that space (`full`), every copy
    is steered to a different point in the server's coordinates.
    """
    return _example_mean((hidden.float() - steering * control).square().mean(dim=-1), targets)


def jensun(logits: torch.Tensor, targets: torch.Tensor, alternate_targets: torch.Tensor) -> torch.Tensor:
    """JSD(p ‖ one-hot token of a refusal) of each answer token's prediction (Singh et al., arXiv 2509.02820).

    The model sees the forget answer, and at its n-th token the target is the n-th token of the refusal, which is repeated
    to the length of the answer, as in github.com/nmndeep/JensUn-Unlearning. There, the refusal is the words alone; here,
    the token that ends an answer belongs to it. JSD to a one-hot distribution depends only on the probability q of its
    token: ln 2 + [q ln q - (1 + q) ln(1 + q)] / 2, which is between 0 (q = 1) and ln 2 (q = 0).
    """
    counted = targets != IGNORED
    ignored = alternate_targets == IGNORED
    refusal = alternate_targets.gather(1, ignored.long().argsort(dim=1, stable=True))
    length = (~ignored).sum(dim=1, keepdim=True).clamp(min=1)
    aims = refusal.gather(1, (counted.cumsum(dim=1) - 1).clamp(min=0) % length)
    log_q = -token_nll(logits, aims.where(counted, torch.full_like(aims, IGNORED)))[counted]
    q = log_q.exp()
    return at_positions(counted, math.log(2) + (q * log_q - (1 + q) * q.log1p()) / 2)


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """CE(D_r), which keeps the retain answers likely."""
    return token_nll(logits, targets)


def kl(logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ model) of each answer token's prediction, in nats (Maini et al., arXiv 2401.06121, section 3).

    OpenUnlearning averages over all positions, prompt and padding included.
    """
    counted = targets != IGNORED
    current = logits[counted].float().log_softmax(dim=-1)
    reference = reference_logits[counted].float().log_softmax(dim=-1)
    return at_positions(counted, (reference.exp() * (reference - current)).sum(dim=-1))


def jsd(logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """JSD(model ‖ reference) of each answer token's prediction, at most ln 2 (Singh et al., arXiv 2509.02820)."""
    counted = targets != IGNORED
    current = logits[counted].float().log_softmax(dim=-1)
    reference = reference_logits[counted].float().log_softmax(dim=-1)
    middle = torch.logaddexp(current, reference) - math.log(2)
    own, other = ((one.exp() * (one - middle)).sum(dim=-1) for one in (current, reference))
    return at_positions(counted, (own + other) / 2)


def same_hidden(hidden: torch.Tensor, targets: torch.Tensor, reference_hidden: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the hidden states from the reference model's, RMU's own retain loss (equation 2)."""
    return _example_mean((hidden.float() - reference_hidden.float()).square().mean(dim=-1), targets)


def _example_mean(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    counted = targets != IGNORED
    return (values * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


RETAIN_LOSSES: dict[str, Loss] = {"nll": nll, "kl": kl, "jsd": jsd, "hidden": same_hidden}
"""Every retain loss, by its name on the command line."""


FORGET_LOSSES: dict[str, Loss] = {
    loss.__name__: loss for loss in (grad_ascent, npo, dpo, simnpo, undial, satimp, wga, ce_u, pdu, rmu, jensun)
}
"""Every forget loss, by its name in `protocol.objectives`."""


@dataclass(frozen=True)
class Losses:
    """The loss functions of an objective, and the inputs that they need."""

    objective: Objective

    @property
    def needs(self) -> frozenset[str]:
        """Names of the inputs that the forget loss takes."""
        return _needs(FORGET_LOSSES[self.objective.forget_loss])

    @property
    def retain_needs(self) -> frozenset[str]:
        """Names of the inputs that the retain loss takes; empty without a retain term."""
        return _needs(RETAIN_LOSSES[self.objective.retain_loss]) if self.objective.alpha else frozenset()

    @property
    def alternates(self) -> bool:
        """Whether forget examples need alternate answers."""
        return "alternate_targets" in self.needs

    @property
    def alternate_passes(self) -> bool:
        """Whether the model also runs on the alternate answers; otherwise only their tokens are used."""
        return "alternate_logits" in self.needs

    @property
    def reference_model(self) -> bool:
        """Whether the reference model itself is needed, not only its log-likelihoods."""
        return bool((self.needs | self.retain_needs) & {"reference_logits", "reference_hidden"})

    def forget(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The forget loss, with the objective's hyperparameters."""
        loss = FORGET_LOSSES[self.objective.forget_loss]
        wanted = inspect.signature(loss).parameters
        return loss(**inputs, **{name: value for name, value in self.objective.parameters.items() if name in wanted})

    def retain(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The retain loss."""
        return RETAIN_LOSSES[self.objective.retain_loss](**inputs)


def _needs(loss: Loss) -> frozenset[str]:
    parameters = inspect.signature(loss).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY)
