"""Finds the common noise that a model can bear: how far its copies can be from it while they still work like it.

The idea: what common noise costs in unlearning depends on how much of the model's function it destroys, which differs
between models by an order of magnitude. The loss of the stand-in θ + c on some text predicts it well. `calibrate`
measures the second moments that shape the noise on one half of the text (see `lm.moments`). It then finds
the largest level κ_c at which the loss on the other half rises by no more than a budget, by bisection over stand-ins that
are written to disk and measured. On the same half, the noise would seem cheaper than it is.

The result is pinned in the model's lineage, and every `preprocess`, `run` and `server start` with --common-noise auto
uses it. This step needs transformers; the others on the server's side do not.

The module is not called `calibrate`, so that `mpunlearn.calibrate` always means the function.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpunlearn.errors import DataError, PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path
from mpunlearn.lm.sources import Data
from mpunlearn.progress import say

if TYPE_CHECKING:
    import torch

BUDGET = 0.05
"""Default rise of the loss, in nats per token."""
MAX_LEVEL = 0.12
"""Largest κ_c. A model that has memorized its text loses little with more, but then what a client unlearns on a stand-in
transfers poorly to the model."""
STEPS = 7
"""Bisection steps over the logarithm of the level, which is then known to within about 5 %."""
MIN_LEVEL = 0.001
"""Smallest κ_c that is tried."""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found."""

    lineage: str
    """Directory of the lineage."""
    level: float
    """κ_c."""
    shape: str
    floor: float
    """Parameter error that is left to a client that averages all copies, relative to the weights."""
    loss: float
    """Loss of the model on the held-out half of the text, in nats per token."""
    stand_in_loss: float
    """Loss of the stand-in."""

    def text(self) -> str:
        """A summary for the terminal."""
        return (
            f"common noise: {self.shape}, κ_c = {self.level:.3g}; averaging all copies leaves a client with a parameter "
            f"error of {self.floor:.1%}\nloss on the calibration text: {self.loss:.3f} nats per token, with the noise "
            f"{self.stand_in_loss:.3f}\npinned in {self.lineage}"
        )

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)


def calibrate(
    checkpoint: str | Path,
    *,
    calibration_text: str | Path,
    function_budget: float = BUDGET,
    common_noise_shape: Literal["whitened", "gauss"] = "whitened",
    lineage: str | Path | None = None,
    max_length: int = 512,
    data: Data | None = None,
) -> Calibration:
    """Finds the largest common noise at which the model's loss on some text rises by no more than a budget.

    The level is pinned in the model's lineage. It can be found again only as long as nothing was published with it.

    Args:
        checkpoint: The server's model, a Hugging Face checkpoint directory.
        calibration_text: Text that the model should still know, the server's own or public, in any format that --forget
            takes. A few hundred examples suffice.
        function_budget: Rise of the loss that is acceptable, in nats per token.
        common_noise_shape: Shape of the noise: whitened or gauss.
        lineage: Directory of the lineage (default: in the user's data folder, found by the model's digest).
        max_length: Maximum number of tokens in an example. Longer answers are truncated, longer plain texts are split.
        data: Columns and locations of the examples.

    Returns:
        The level, the floor it gives, and what it costs.

    Raises:
        DataError: The text cannot be read.
        PlanError: The budget is not above 0, or even the smallest noise exceeds it.
        StateError: The lineage is damaged, or its levels are in use.
        CheckpointError: The model cannot be read.
    """
    needs("client", "calibrate")
    from mpunlearn.architecture import Architecture
    from mpunlearn.checkpoint import Checkpoint
    from mpunlearn.lm.examples import encode
    from mpunlearn.lm.model import load, load_model, nll
    from mpunlearn.lm.moments import embedding_moment, input_moments
    from mpunlearn.lm.records import read_records
    from mpunlearn.server.lineage import Lineage, Moments
    from mpunlearn.server.noise import measure
    from mpunlearn.server.offset import CommonNoise, Offset, OffsetRecord, write_stand_in

    if not function_budget > 0:
        raise PlanError(f"--function-budget: expected a number above 0, found {function_budget:g}")
    source = Checkpoint(as_path(checkpoint, "checkpoint"))
    architecture = Architecture.of(source)
    roles = architecture.tensor_roles(source)
    records = read_records(as_path(calibration_text, "--calibration-text"), data or Data(), "calibration text")
    model, tokenizer = load(source.path)
    examples = encode(records, tokenizer, max_length)
    shaping, held_out = examples[::2], examples[1::2]
    if not held_out:
        raise DataError(f"--calibration-text {calibration_text}: expected at least 2 examples, found {len(examples)}")
    tokens = sum(example.tokens for example in held_out)
    measured = measure(source, None, roles)
    kept = Lineage.of(measured, roles, as_path(lineage, "--lineage") if lineage is not None else None)
    kept.check_unused()
    loss = sum(nll(model, held_out, 8, tokenizer)) / tokens
    if common_noise_shape == "whitened":
        layers = [name for name, role in roles.items() if role.layer is not None and len(role.axes) == 2]
        family = architecture.family
        inputs, matrices = input_moments(model, tokenizer, shaping, [*layers, family.head])
        tied = inputs.pop(family.head) if family.head not in roles and family.head in inputs else None
        embedding = _normalized(embedding_moment(model, tokenizer, shaping))
        matrices.append(embedding if tied is None else embedding + _normalized(matrices[tied]))
        kept.keep_moments(Moments({**inputs, family.embedding: len(matrices) - 1}, matrices))
    del model

    def stand_in_loss(common: CommonNoise) -> float:
        offset = Offset(OffsetRecord(str(kept.path), common), kept.secret, kept.whitening)
        with tempfile.TemporaryDirectory(dir=kept.path) as folder:
            stand_in = load_model(write_stand_in(source, offset, Path(folder) / "stand-in"))
        return sum(nll(stand_in, held_out, 8, tokenizer)) / tokens

    low, high = MIN_LEVEL, MAX_LEVEL
    best: tuple[CommonNoise, float] | None = None
    for step in range(STEPS + 2):
        level = {0: low, 1: high}.get(step, (low * high) ** 0.5)
        common = kept.levels(level, common_noise_shape, measured, roles)
        changed = stand_in_loss(common)
        say(f"κ_c = {level:.3g}: loss {changed:.3f}, without noise {loss:.3f}")
        if changed - loss <= function_budget:
            low, best = level, (common, changed)
            if level == MAX_LEVEL:
                break
        elif best is None:
            raise PlanError(
                f"--function-budget {function_budget:g}: even κ_c = {MIN_LEVEL:g} raises the loss from {loss:.3f} to "
                f"{changed:.3f}; allow more, or give --common-noise 0 and read what that discloses"
            )
        else:
            high = level
    assert best is not None
    common, changed = best
    kept.pin(common)
    return Calibration(str(kept.path), common.level, common.shape, common.floor, loss, changed)


def _normalized(moment: "torch.Tensor") -> "torch.Tensor":
    """A matrix of second moments whose largest eigenvalue is 1."""
    import torch

    largest: torch.Tensor = torch.linalg.eigvalsh(moment)[-1]
    return moment / largest.clamp_min(1e-30)
