"""Regenerates all secrets of a copy from a known key and removes them: the control that must succeed.

Source: the official code of arXiv 2602.23798 seeds noise and reparameterizations with constants plus the round number.
Threat model: a client knows or guesses the key of the run, and the key of the lineage if there is common noise. Here
both come from the operating system's entropy, so that nobody does. If this does not give θ up to rounding, either the
copy is not one of this state's, or the audit is broken.

Not covered: guessing keys.
"""

import torch

from mpunlearn.audit.weights import Model
from mpunlearn.server.noise import block_of, floored
from mpunlearn.server.offset import Offset
from mpunlearn.server.reparameterization import Reparameterization
from mpunlearn.server.secret import Secret
from mpunlearn.server.state import RoundRecord
from mpunlearn.server.stream import RowSlice
from mpunlearn.server.workspace import Workspace


def predictable(copy: Model, number: int, secret: Secret, record: RoundRecord, offset: Offset) -> Model:
    """θ in its own coordinates, up to the rounding of the copy.

    Args:
        copy: a published copy.
        number: which copy of its round it is, starting at 0.
        secret: the run's key.
        record: the record of the round, all of which a known key makes known.
        offset: the secret offset of the copies.
    """
    perturbation = record.perturbation
    coefficients = perturbation.design(record.alphas).coefficients[number]
    maps = Reparameterization(copy.architecture, perturbation.reparameterization, secret, record.inputs, number)
    weights, workspace = {}, Workspace()
    for name, published in copy.weights.items():
        role = copy.role(name)
        value = maps.invert(role, copy.weights[maps.published_name(name, role)].double())
        outside = role.layer is None and perturbation.noise_scope == "layers"
        level: float | torch.Tensor = 0.0 if outside else record.sigma[block_of(name, role)]
        if level and perturbation.noise_floor == "grid":
            level = floored(float(level), value, getattr(torch, record.dtypes[name]))
        for draw, coefficient in enumerate(coefficients):
            normals = secret.stream("noise", record.inputs, draw, name).normals(value.numel())
            value = value - float(coefficient) * level * normals.double().view(value.shape)
        c = torch.zeros(published.shape, dtype=published.dtype)
        with workspace.frame():
            offset.add(c, RowSlice(name, role, 0, len(c)), 0, workspace)
        weights[name] = (value - c.double()).to(published.dtype)
    return Model(copy.architecture, weights)
