"""Named combinations of options, for `--preset`. Options that are given one by one take precedence.

`paper` is the method as published: it hides the model from a client that holds some copies of a round, not from one that
holds all. `hardened`, which is also the default, adds common noise, which no number of copies cancels. `lean` publishes a
single copy with the same common noise, once: where one party holds all copies anyway, it leaves that party with the same
error as `hardened`, for a third of the client's work and a fifteenth of the traffic. `compartment` is `hardened` with the
copies made of a stand-in, which has unlearned what this client has no business with.
"""

from typing import Any

HARDENED = {
    "copies": 3, "kappa": 0.05, "denoising": "harmonic", "common_noise": "auto", "rounds": 5, "epochs": 2,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"copies": 3, "kappa": 0.01, "denoising": "harmonic", "common_noise": 0.0},
    "hardened": HARDENED,
    "lean": {"copies": 1, "kappa": 0.0, "common_noise": "auto", "rounds": 1, "epochs": 10},
    "compartment": HARDENED,
}  # fmt: skip
ADVICE = (
    "where one party holds all copies, --preset lean leaves it with the same parameter error, for a third of its work"
)
NEEDED = {"compartment": ("stand_in",)}
"""Preset → options that have to be given with it."""
