"""How close a model comes to the server's model as a function: on the same text, predictions are compared.

The idea: a copy hides parameters, not what the model can do. So the audit also says how much of the function a copy or
an estimate has, by the logits, the divergence and the next token at every answer position of a text, and by the
probability of the answers. Both models see the same batches.

Not covered: generated text, and abilities that the given text does not show.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpunlearn.audit.weights import Model
from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.model import forward, pad_id, quiet

BATCH = 8


@dataclass(frozen=True)
class Behavior:
    """The predictions of a model on a text, beside those of θ."""

    logit_error: float
    """‖logits - logits of θ‖ / ‖logits of θ‖, each position centered, since a constant does not change predictions."""
    kl: float
    """Mean KL divergence of the predictions from those of θ, in nats per token."""
    agreement: float
    """Share of positions where both rank the same token first."""
    probability: float
    """Mean over examples of the probability per answer token, exp(-mean NLL), as TOFU defines it."""

    def to_json(self) -> dict[str, float]:
        """The comparison as JSON."""
        return dataclasses.asdict(self)


def with_weights(theta: Any, model: Model) -> Any:
    """A transformers model with the given weights.

    Args:
        theta: a loaded transformers model of the same architecture.
        model: the weights, in any coordinates.
    """
    # from_pretrained may take over the tensors as parameters, which training would then change.
    own = {name: value.clone() for name, value in model.weights.items()}
    with quiet():
        loaded = type(theta).from_pretrained(None, config=theta.config, state_dict=own, dtype=torch.float32)
    return loaded.to(theta.device).eval()


@torch.no_grad()
def behavior(theta: Any, other: Any, tokenizer: Any, examples: Sequence[Example]) -> Behavior:
    """Compares two loaded transformers models on tokenized examples; neither is modified.

    Args:
        theta: the server's model.
        other: the model that is compared with it.
        tokenizer: the tokenizer of both.
        examples: the text, at least one example.
    """
    theta.eval()
    other.eval()
    apart = size = divergence = same = positions = 0.0
    probabilities: list[float] = []
    for start in range(0, len(examples), BATCH):
        batch = collate(examples[start : start + BATCH], pad_id(tokenizer))
        batch = {key: tensor.to(theta.device) for key, tensor in batch.items()}
        ours, theirs = forward(theta, batch), forward(other, batch)
        targets = ours["targets"]
        counted = targets != IGNORED
        expected, found = (output["logits"][counted].double() for output in (ours, theirs))
        expected, found = (logits - logits.mean(dim=1, keepdim=True) for logits in (expected, found))
        apart += float((found - expected).square().sum())
        size += float(expected.square().sum())
        p, q = expected.log_softmax(dim=1), found.log_softmax(dim=1)
        divergence += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(dim=1) == q.argmax(dim=1)).sum())
        positions += len(p)
        own = q.gather(1, targets[counted][:, None]).flatten()
        lengths = counted.sum(dim=1).tolist()
        probabilities += [math.exp(float(part.mean())) for part in torch.split(own, lengths)]
    return Behavior(
        (apart / size) ** 0.5, divergence / positions, same / positions, sum(probabilities) / len(probabilities)
    )
