"""Hyperparameters that are known to work, for each objective and size of model, with their sources.

For real models they are those of public work on TOFU (arXiv 2401.06121), forget10; most are settings of OpenUnlearning
(arXiv 2506.12618). For models as small as the demo's they are the best of a sweep (`benchmarks/hyperparameters.py`). A
public setting counts epochs of one training; here they are spread over the rounds of a run.

Differences that remain: OpenUnlearning warms up for one epoch and then decays the learning rate linearly, and uses a
weight decay of 0.01; a run has a constant rate and no decay by default, so its mean learning rate is higher. In a run, the
state of the optimizer is reset in every round. None of the public settings was chosen for noisy copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mpunlearn.protocol.objectives import ObjectiveName
from mpunlearn.tables import markdown

SizeClass = Literal["tiny", "small", "large"]
TINY, SMALL = 50_000_000, 3_500_000_000
"""Parameters below which a model is tiny, and up to which it is small: 3 B models have up to 3.4 billion."""
CLASSES: dict[SizeClass, str] = {"tiny": "below 50 M", "small": "50 M to 3 B", "large": "above 3 B"}

_REPOSITORY = "https://github.com/locuslab/open-unlearning/blob/main"
DEFAULTS = f"{_REPOSITORY}/configs/experiment/unlearn/tofu/default.yaml, configs/trainer/finetune.yaml"
SWEPT = "python benchmarks/hyperparameters.py (docs/hyperparameters.csv)"
_JENSUN = "https://github.com/nmndeep/JensUn-Unlearning/blob/main"
_REPSELECT = "https://github.com/filyp/RepSelect/blob/main"
_SELECTED = "https://huggingface.co/Naahraf27/npo_llama-3.{0}-instruct_forget10_ep{1}_lr{2}_alpha{3}_beta0.1"


@dataclass(frozen=True)
class Recommendation:
    """Hyperparameters for an objective and a size class, as options of `run`."""

    objective: ObjectiveName
    size: SizeClass
    learning_rate: float
    batch_size: int
    epochs: int
    """Passes over the forget set in the whole run."""
    source: str
    """Where the values come from."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Further options, such as gamma, alpha, the optimizer and the objective's own, where they differ from the defaults or
    were chosen together with the learning rate."""
    note: str = ""

    def options(self, rounds: int) -> dict[str, Any]:
        """The values as options of a run with so many rounds. The epochs are rounded up to whole ones in each round."""
        return {
            "objective": self.objective,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "epochs": max(1, -(-self.epochs // rounds)),
            **self.others,
        }


def size_class(parameters: int) -> SizeClass:
    """The size class of a model with so many parameters."""
    return "tiny" if parameters < TINY else "small" if parameters <= SMALL else "large"


def recommendation(objective: ObjectiveName, parameters: int) -> Recommendation:
    """The recommendation for an objective and a number of parameters."""
    size = size_class(parameters)
    return next(row for row in TABLE if (row.objective, row.size) == (objective, size))


def _tiny(objective: ObjectiveName, learning_rate: float, gamma: float, note: str = "") -> Recommendation:
    """A row of the sweep on the demo's world."""
    special: dict[str, dict[str, Any]] = {"rmu": {"layer": 0}, "repselect": {"optimizer": "tensor_adam"}}
    others = {"gamma": gamma, **special.get(objective, {})}
    return Recommendation(objective, "tiny", learning_rate, 8, 10, SWEPT, others, note)


def _both(objective: ObjectiveName, *values: Any, **others: Any) -> list[Recommendation]:
    """The same row for small and for large models."""
    return [Recommendation(objective, size, *values, **others) for size in ("small", "large")]


TABLE: list[Recommendation] = [
    *_both("grad-ascent", 1e-5, 32, 10, DEFAULTS,
           note="OpenUnlearning reports a model utility of 0 on forget10 with it (its docs/repro.md): use fewer epochs"),
    *_both("grad-diff", 1e-5, 32, 10, DEFAULTS),
    Recommendation("npo", "small", 5e-5, 32, 10, _SELECTED.format("2-1b", 10, "5e-5", "1.0"), {"alpha": 1.0, "beta": 0.1},
                   "the published checkpoint for 1 B; for 3 B: learning rate 2e-5, 5 epochs, alpha 2"),
    Recommendation("npo", "large", 5e-5, 32, 5, _SELECTED.format("1-8b", 5, "5e-5", "2.0"), {"alpha": 2.0, "beta": 0.1},
                   "the published checkpoint for 8 B"),
    *_both("dpo", 1e-5, 32, 10, f"{_REPOSITORY}/configs/experiment/unlearn/tofu/idk.yaml, configs/trainer/DPO.yaml",
           {"beta": 0.1}),
    *_both("simnpo", 1e-5, 32, 10,
           f"{_REPOSITORY}/configs/trainer/SimNPO.yaml; https://huggingface.co/OPTML-Group/SimNPO-TOFU-forget10-Llama-2-7b-chat",
           {"gamma": 0.125, "beta": 4.5, "delta": 0.0}, "OpenUnlearning also tries 2e-5 and 5e-5"),
    *_both("undial", 1e-4, 32, 10, f"{_REPOSITORY}/configs/trainer/UNDIAL.yaml", {"beta": 10.0}),
    *_both("satimp", 1e-5, 32, 5, f"{_REPOSITORY}/configs/trainer/SatImp.yaml, community/methods/SatImp/run.sh",
           {"gamma": 0.1, "beta1": 5.0, "beta2": 1.0}),
    *_both("wga", 1e-5, 32, 5, f"{_REPOSITORY}/configs/trainer/WGA.yaml, community/methods/WGA/run.sh", {"beta": 1.0}),
    *_both("ngdiff", 1e-5, 32, 10, DEFAULTS,
           note="OpenUnlearning has no setting for it; these are its common defaults. It adapts the learning rate itself"),
    *_both("rmu", 1e-5, 32, 10, f"{_REPOSITORY}/configs/trainer/RMU.yaml", {"steering": 2.0, "layer": 7},
           "OpenUnlearning says that steering and layer depend on the model and have to be tuned"),
    *_both("ce-u", 1e-5, 32, 10, f"{_REPOSITORY}/configs/trainer/CEU.yaml, community/methods/CEU/run.sh"),
    Recommendation("pdu", "small", 1e-5, 128, 10, f"{_REPOSITORY}/community/methods/PDU/run.sh",
                   {"alpha": 100.0, "retain_target": 0.3, "dual_step": 5.0, "dual_warmup": 5}),
    Recommendation("pdu", "large", 1e-5, 128, 30, f"{_REPOSITORY}/community/methods/PDU/run.sh",
                   {"alpha": 100.0, "retain_target": 0.3, "dual_step": 5.0, "dual_warmup": 5}),
    *_both("altpo", 2e-5, 32, 10, f"{_REPOSITORY}/community/methods/AltPO/run.sh; https://huggingface.co/open-unlearning",
           {"alpha": 2.0, "beta": 0.1},
           "the middle of OpenUnlearning's grid: learning rate 1e-5 to 5e-5, alpha 1 to 5, beta 0.05 to 0.5; 5 or 10 epochs"),
    *_both("jensun", 8e-6, 32, 10, f"{_JENSUN}/configs/experiment/unlearn/lkf/default.yaml, scripts/lkf_unlearn.sh",
           note="chosen on another benchmark (LKF), with 3 B parameters"),
    *_both("repselect", 0.05, 32, 10, f"{_REPSELECT}/configs/trainer/RepSelectSimple.yaml",
           {"optimizer": "sgd", "components": 512, "soft": 1},
           "that project searches for a learning rate between 0.005 and 0.5 for each model, on other benchmarks"),
    _tiny("grad-ascent", 3e-4, 1.0),
    _tiny("grad-diff", 1e-3, 0.1),
    _tiny("npo", 1e-3, 0.1),
    _tiny("dpo", 3e-3, 0.1, "in the sweep it hardly unlearned at any setting"),
    _tiny("simnpo", 1e-3, 1.0),
    _tiny("undial", 1e-3, 1.0),
    _tiny("satimp", 3e-3, 1.0, "in the sweep it hardly unlearned at any setting"),
    _tiny("wga", 1e-3, 1.0),
    _tiny("ngdiff", 3e-4, 1.0),
    _tiny("rmu", 3e-3, 1.0),
    _tiny("ce-u", 3e-4, 1.0, "in the sweep it damaged the retain set at every setting that unlearned"),
    _tiny("pdu", 1e-3, 0.1),
    _tiny("altpo", 1e-3, 0.1),
    _tiny("jensun", 3e-3, 1.0, "in the sweep it hardly unlearned at any setting"),
    _tiny("repselect", 1e-3, 1.0),
]  # fmt: skip
"""All recommendations: one for each objective and size class."""


def table() -> str:
    """All recommendations as Markdown, as in docs/hyperparameters.md."""
    sources: dict[str, int] = {}
    rows = []
    for row in sorted(TABLE, key=lambda row: (list(CLASSES).index(row.size), row.objective)):
        number = sources.setdefault(row.source, len(sources) + 1)
        shown = {name: value if isinstance(value, str) else f"{value:g}" for name, value in row.others.items()}
        others = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in shown.items())
        numbers = (f"{row.learning_rate:g}", str(row.batch_size), str(row.epochs), others)
        rows.append((CLASSES[row.size], row.objective, *numbers, f"[{number}]", row.note))
    header = ("parameters", "objective", "learning rate", "batch size", "epochs", "further options", "source", "note")
    listed = "\n".join(f"- [{number}] {source}" for source, number in sources.items())
    return f"{markdown(header, rows)}\n\n{listed}"
