"""Named combinations of options, for `--preset`. Options that are given one by one take precedence.

`paper` is the method as published: it hides the model from a client that holds some copies of a round, not from one that
holds all. `hardened` adds common noise, which no number of copies cancels. `lean` publishes a single copy with the same
common noise, once: where one party holds all copies anyway, it leaves that party with the same error as `hardened`, for a
third of the client's work and a fifteenth of the traffic.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"copies": 3, "kappa": 0.01, "denoising": "harmonic", "common_noise": 0.0},
    "hardened": {
        "copies": 3, "kappa": 0.05, "denoising": "harmonic", "common_noise": "auto", "rounds": 5, "epochs": 2,
    },
    "lean": {"copies": 1, "kappa": 0.0, "common_noise": "auto", "rounds": 1, "epochs": 10},
}  # fmt: skip
