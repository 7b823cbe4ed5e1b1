"""Measures how far an attacker who knows the shape of whitened common noise can remove it, beside Gaussian noise.

The second moments that shape the noise follow from public text, if the attacker has text of the right kind. It then undoes the
shape, so that the noise is independent from entry to entry, shrinks singular values (`mpunlearn.audit.attacks.shrink`), and
applies the shape again. Here it is given the exact matrices, the size of the noise in each tensor, and an estimate in the
coordinates of θ, which is more than a real attacker has.

    python benchmarks/shaped_noise.py [--tofu DIRECTORY_WITH_TOFU_JSON_FILES] [--seeds 2]

Prints the parameter error that is left, relative to the weights: of an average of all copies, after shrinking without and with
the shape, from the average alone and from its difference from the public base. Both kinds of noise have the floor that
`calibrate` finds for the whitened one.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import torch

from disclosure import calibrated
from disclosure_arms import World, worlds
from mpunlearn.architecture import Architecture
from mpunlearn.audit.attacks.shrink import shrunk_matrix
from mpunlearn.audit.weights import Model, norm
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.server.lineage import Lineage
from mpunlearn.server.noise import measure
from mpunlearn.server.offset import CommonNoise, Offset, OffsetRecord, write_stand_in
from mpunlearn.tables import markdown

COLUMNS = ("averaged", "shrunk", "shape known", "shrunk, base", "shape known, base")


def errors(world: World, lineage: Lineage, common: CommonNoise, folder: Path) -> list[float]:
    """The parameter errors in the order of `COLUMNS`."""
    offset = Offset(OffsetRecord(str(lineage.path), common), lineage.secret, lineage.whitening)
    theta = Model.read(world.models.original).weights
    averaged = Model.read(write_stand_in(Checkpoint(world.models.original), offset, folder)).weights
    base = Model.read(world.models.base).weights
    found = [norm(averaged[name] - theta[name] for name in theta)]
    for known in (dict.fromkeys(theta, torch.zeros(())), base):
        for shaped in (False, True):
            whitening = lineage.whitening if shaped and common.shape == "whitened" else None
            left = []
            for name, value in theta.items():
                estimate = (averaged[name] - known[name]).double()
                if value.dim() == 2 and common.sigma[name]:
                    shape = None
                    if whitening is not None and name in whitening:
                        shape = whitening.apply(torch.eye(value.shape[1], dtype=torch.float64), name)
                    estimate = without_noise(estimate, common.sigma[name], shape)
                left.append(estimate + known[name] - value)
            found.append(norm(left))
    return [error / norm(theta.values()) for error in found]


def without_noise(estimate: torch.Tensor, sigma: float, shape: torch.Tensor | None) -> torch.Tensor:
    """A matrix with noise σ Z M, shrunk where the noise is σ Z.

    Args:
        estimate: the matrix plus the noise, float64.
        sigma: σ.
        shape: M; None for the identity.
    """
    if shape is None:
        return shrunk_matrix(estimate, sigma)
    return shrunk_matrix(torch.linalg.solve(shape, estimate, left=False), sigma) @ shape


def rows(world: World) -> list[tuple[str, list[float]]]:
    """Whitened noise of the calibrated level, and Gaussian noise of the same floor."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lineage = Lineage(calibrated(world, folder))
        source = Checkpoint(world.models.original)
        roles = Architecture.of(source).tensor_roles(source)
        whitened = lineage.record.common
        assert whitened is not None
        gauss = lineage.levels(whitened.floor, "gauss", measure(source, None, roles), roles)
        assert math.isclose(gauss.floor, whitened.floor, rel_tol=1e-6)
        return [(common.shape, errors(world, lineage, common, folder / common.shape)) for common in (gauss, whitened)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, help="directory with full.json (default: only the built-in benchmark)")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[list[float]]] = {}
    for seed in range(arguments.seeds):
        for world in worlds(seed, ["toy", "tofu"], arguments.tofu):
            for shape, numbers in rows(world):
                found.setdefault((world.name, shape), []).append(numbers)
    lines = [
        [*key, *(f"{statistics.mean(column):.1%}" for column in zip(*lists, strict=True))]
        for key, lists in sorted(found.items())
    ]
    print(markdown(["world", "common noise", *COLUMNS], lines))


if __name__ == "__main__":
    main()
