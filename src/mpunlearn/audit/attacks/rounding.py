"""Rounds an estimate to the grid on which θ is stored.

Source: noise far below the spacing of the storage dtype is undone by rounding; so it is for almost all entries at the
noise level of arXiv 2602.23798, if the task vector is a few percent of the weights and these are stored in bfloat16.
Threat model: a client has an estimate of θ in the coordinates of θ, which it gets by aligning to the public base, and
knows the storage dtype, which config.json says.

Not covered: estimates in coordinates of their own. The signed permutations do not matter, but weights that were rotated
are not on the grid.
"""

import torch

from mpunlearn.audit.weights import Model


def rounding(estimate: Model, grid: torch.dtype) -> Model:
    """The nearest model on the grid.

    Args:
        estimate: an estimate in the coordinates of θ.
        grid: the storage dtype of θ.
    """
    weights = {name: value.to(grid).to(value.dtype) for name, value in estimate.weights.items()}
    return Model(estimate.architecture, weights)
