"""LLM unlearning between a model owner (server) and a data owner (client) that keep their assets private.

The method is MPU (Multiple Perturbed Copies Unlearning, arXiv 2602.23798). In each round, the server publishes several
noisy, reparameterized copies of its model, the client unlearns its text on each copy, and the server inverts the
reparameterizations and averages the updates so that the first-order effect of the noise cancels.

The functions are also the commands of the command line: `preprocess`, `postprocess` and `describe` for the server,
`unlearn` for the client, `run` for both in one process, `forget` for one party alone, and `evaluate`. For models in
memory there are `publish` and `aggregate`, and `forget` takes such a model, too. Their options are grouped in `Perturbation`,
`Training`, `Data` and `Resources`. Names are imported lazily, so using the server's functions does not load the
client's dependencies.
"""

from typing import TYPE_CHECKING

from mpunlearn.version import __version__ as __version__

__all__ = [
    "Client",
    "Data",
    "DisclosureWarning",
    "MPUError",
    "Perturbation",
    "Resources",
    "Training",
    "aggregate",
    "calibrate",
    "describe",
    "evaluate",
    "forget",
    "postprocess",
    "preprocess",
    "publish",
    "run",
    "unlearn",
]

if TYPE_CHECKING:
    from mpunlearn.calibration import calibrate
    from mpunlearn.client.client import Client
    from mpunlearn.client.forget import forget
    from mpunlearn.client.resources import Resources
    from mpunlearn.client.unlearn import unlearn
    from mpunlearn.errors import DisclosureWarning, MPUError
    from mpunlearn.evaluation.evaluate import evaluate
    from mpunlearn.in_memory import aggregate, publish
    from mpunlearn.lm.sources import Data
    from mpunlearn.local import run
    from mpunlearn.protocol.plan import Training
    from mpunlearn.server.describe import describe
    from mpunlearn.server.perturbation import Perturbation
    from mpunlearn.server.postprocess import postprocess
    from mpunlearn.server.preprocess import preprocess
else:
    _HOMES = {
        "Client": "client.client",
        "Data": "lm.sources",
        "DisclosureWarning": "errors",
        "MPUError": "errors",
        "Perturbation": "server.perturbation",
        "Resources": "client.resources",
        "Training": "protocol.plan",
        "aggregate": "in_memory",
        "calibrate": "calibration",
        "describe": "server.describe",
        "evaluate": "evaluation.evaluate",
        "forget": "client.forget",
        "postprocess": "server.postprocess",
        "preprocess": "server.preprocess",
        "publish": "in_memory",
        "run": "local",
        "unlearn": "client.unlearn",
    }

    def __getattr__(name):
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module 'mpunlearn' has no attribute {name!r}")
        return getattr(import_module(f"mpunlearn.{_HOMES[name]}"), name)

    def __dir__():
        return sorted([*globals(), *__all__])
