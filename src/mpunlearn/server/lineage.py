"""The lineage of a model: the secret key of the common noise, and its levels.

The common noise c of `offset` must be the same in all copies of all rounds and runs of a model and of the models that
descend from it. Drawn anew in every round or run, it would average away as one over the square root of their number.
Its key therefore does not belong to a run but to the lineage:

    LINEAGE/secret.key          32 bytes, mode 0600
    LINEAGE/lineage.json        the models that belong to it, by digest, and the levels, pinned when they are first used
    LINEAGE/moments/            second moments of the inputs of linear layers, after `mpunlearn calibrate`

By default, lineages are in the user's data folder and are found by the digest of a model. `postprocess` adds the models
that it writes. A lineage ends when one of its models is published, because a copy minus that model then shows c: give
the successors a new one with --lineage.

Not covered: models that were changed with other tools. They have a digest that no lineage knows, and with a new lineage
the client gets copies with a second, independent offset. Give --lineage to stay in the old one.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mpunlearn.architecture import TensorRole
from mpunlearn.checkpoint import TensorWriter
from mpunlearn.errors import FileError, PlanError, SchemaError, StateError
from mpunlearn.files import data_folder, exclusive, new_directory
from mpunlearn.progress import say
from mpunlearn.schema import read, write
from mpunlearn.server.noise import Measurement, block_of
from mpunlearn.server.offset import DAMPING, CommonNoise, Offset, OffsetRecord, Shape, Whitening
from mpunlearn.server.secret import Secret

UNCALIBRATED = 0.05
"""κ_c of `auto` without calibration. `benchmarks/disclosure.py` measures its price (gauss 5 %)."""
UNSHAPED_LEVEL = 0.05
"""Maximum κ_c, relative to the RMS of their block, of matrices that have no second moments in a whitened offset."""
VECTOR_LEVEL = 0.02
"""The same for vectors, such as norm weights, which are few but act on every token."""
MAX_RANK = 512
"""Maximum number of directions that are kept of the second moments of an input."""
NEGLIGIBLE = 1e-2
"""Directions whose gain differs from that of the least frequent ones by less than this share are not kept."""


@dataclass(frozen=True)
class LineageRecord:
    """The content of lineage.json."""

    models: list[str]
    """`model_digest` of every model that belongs to the lineage."""
    shapes: str
    """SHA-256 over the names and shapes of the model's tensors."""
    inputs: dict[str, int] = field(default_factory=dict)
    """For each weight that has second moments, their index. Earlier calibrations left out embeddings and LM heads."""
    common: CommonNoise | None = None
    """The pinned levels."""
    used: bool = False
    """Whether copies may have been published with them."""
    format: int = 1


def model_digest(digests: Mapping[str, list[str]]) -> str:
    """SHA-256 (hex) over the digests of a model's slices, as in the record of a round."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


class Lineage:
    """The lineage in a directory.

    Args:
        path: the directory.

    Raises:
        StateError: the directory is not a valid lineage, or other users can access it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if mode := path.stat().st_mode & 0o077:
                raise StateError(
                    f"{path}: other users can access the lineage (mode bits {mode:03o}); run `chmod 700 {path}`"
                )
            self.secret = Secret.load(path / "secret.key")
            self.record = read(LineageRecord, path / "lineage.json")
        except (FileError, SchemaError, OSError) as error:
            raise StateError(f"{path}: not a valid lineage: {error}") from None

    @classmethod
    def of(cls, measured: Measurement, roles: Mapping[str, TensorRole], path: Path | None = None) -> "Lineage":
        """The lineage that a model belongs to; a new one if there is none yet.

        Args:
            measured: the measurement of the model.
            roles: its tensors.
            path: the directory (default: found by the model's digest in the user's data folder).

        Raises:
            StateError: the lineage is damaged, or belongs to a model of other shapes.
        """
        digest, shapes = model_digest(measured.digests), _shapes_digest(measured, roles)
        path = path or _find(digest) or _folder() / digest[:16]
        with exclusive(path.parent / f".{path.name}.lock"):
            if not path.exists():
                with new_directory(path, mode=0o700) as folder:
                    Secret.generate().save(folder / "secret.key")
                    write(folder / "lineage.json", LineageRecord([digest], shapes))
                say(
                    f"created the lineage {path}: keep it secret, and as long as there are models that descend from this one"
                )
            lineage = cls(path)
            if lineage.record.shapes != shapes:
                raise StateError(f"{path}: belongs to a model with other tensors; choose another --lineage")
            lineage.adopt(digest)
        return lineage

    @property
    def whitening(self) -> Whitening:
        """The matrices that shape the common noise."""
        return Whitening(self.record.inputs, self.path / "moments")

    def adopt(self, digest: str) -> None:
        """Adds a model to the lineage."""
        if digest not in self.record.models:
            self._store(dataclasses.replace(self.record, models=[*self.record.models, digest]))

    def check_unused(self) -> None:
        """Checks that the levels may still be chosen.

        Raises:
            StateError: copies may have been published with the pinned levels. Others would be a second offset.
        """
        if self.record.used:
            raise StateError(f"{self.path}: its common noise is in use and cannot be calibrated again")

    def keep_moments(self, moments: "Moments") -> None:
        """Stores second moments."""
        vectors = {}
        for number, moment in enumerate(moments.matrices):
            vectors[f"{number}.vectors"], vectors[f"{number}.values"] = whitening_of(moment)
        self._store(dataclasses.replace(self.record, inputs={}))
        shutil.rmtree(self.path / "moments", ignore_errors=True)
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in vectors.items()}
        with new_directory(self.path / "moments", mode=0o700) as folder, TensorWriter(folder, specs) as writer:
            for name, tensor in vectors.items():
                writer.write(name, tensor)
        self._store(dataclasses.replace(self.record, inputs=dict(moments.inputs)))

    def levels(self, level: float, shape: Shape, measured: Measurement, roles: Mapping[str, TensorRole]) -> CommonNoise:
        """The levels of common noise for κ_c = `level`, without pinning them.

        With the shape `whitened`, κ_c is relative to the RMS of each weight that has second moments.
        """
        if shape == "whitened" and not self.record.inputs:
            raise PlanError(
                f"--common-noise-shape whitened: {self.path} has no second moments; run `mpunlearn calibrate` first, or "
                "choose gauss"
            )
        sigma, square, total = {}, 0.0, 0.0
        for name, role in roles.items():
            entries = measured.counts[name]
            if shape == "whitened" and name in self.record.inputs:
                sigma[name] = level * math.sqrt(measured.squares[name] / entries)
            else:
                limit = UNSHAPED_LEVEL if len(role.axes) > 1 else VECTOR_LEVEL
                most = limit if shape == "whitened" else math.inf
                sigma[name] = min(level, most) * measured.weights[block_of(name, role)]
            square += sigma[name] ** 2 * entries
            total += measured.squares[name]
        return CommonNoise(level, shape, sigma, math.sqrt(square / total))

    def pin(self, common: CommonNoise) -> CommonNoise:
        """Pins the levels, for the first time or, as long as they are unused, again."""
        self._store(dataclasses.replace(self.record, common=common))
        return common

    def use(self, common: CommonNoise) -> CommonNoise:
        """Pins the levels for good, because copies are about to be published with them."""
        self._store(dataclasses.replace(self.record, common=common, used=True))
        return common

    def common_noise(
        self, wanted: float | str, shape: Shape, measured: Measurement, roles: Mapping[str, TensorRole]
    ) -> CommonNoise:
        """The pinned levels; if none are pinned yet, pins those that are asked for.

        Args:
            wanted: κ_c, or "auto" for what is pinned or, without calibration, Gaussian noise of `UNCALIBRATED`.
            shape: the shape; with auto, that of the pinned levels.
            measured: the measurement of the model.
            roles: its tensors.

        Raises:
            PlanError: other levels are in use, or the shape needs a calibration.
        """
        pinned = self.record.common
        if pinned is not None and (wanted == "auto" or self.record.used):
            if wanted != "auto" and (pinned.level, pinned.shape) != (wanted, shape):
                raise PlanError(
                    f"--common-noise {wanted}: {self.path} has been used with {pinned.level:g} ({pinned.shape}), and the "
                    "difference between two offsets would show both; use `auto`, or another --lineage if no client has "
                    "copies of both"
                )
            return self.use(pinned)
        if wanted == "auto":
            say(
                f"common noise: Gaussian, {UNCALIBRATED:.0%} of the weights, because the model was not calibrated; "
                "`mpunlearn calibrate` finds what it can bear"
            )
            return self.use(self.levels(UNCALIBRATED, "gauss", measured, roles))
        return self.use(self.levels(float(wanted), shape, measured, roles))

    def _store(self, record: LineageRecord) -> None:
        write(self.path / "lineage.json", record)
        self.record = record


def open_offset(record: OffsetRecord | None) -> Offset:
    """The offset of a round, from its record.

    Raises:
        StateError: the lineage is missing or damaged, or its levels have changed.
        CheckpointError: the stand-in cannot be read.
    """
    if record is None or record.lineage is None:
        return Offset(record)
    lineage = Lineage(Path(record.lineage))
    if lineage.record.common != record.common:
        raise StateError(f"{lineage.path}: its levels are not those that the run started with; restore the lineage")
    return Offset(record, lineage.secret, lineage.whitening)


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of linear layers on calibration text, and that of the embedding."""

    inputs: Mapping[str, int]
    """For each weight, the index of its matrix."""
    matrices: list[torch.Tensor]
    """E[x xᵀ] of each input x, shape (inputs, inputs), float32 or float64."""


def whitening_of(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eigenvectors U, shape (inputs, r), and values f, shape (r,), float32, of M ∝ I + U diag(f) Uᵀ.

    M = (Σ/λ + δ)^(-1/2) √δ, so that directions without inputs keep their variance.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    share = (values / values[-1].clamp_min(1e-30)).clamp_min(0)
    gain = ((share + DAMPING) / DAMPING).rsqrt()
    kept = (gain < 1 - NEGLIGIBLE).nonzero().flatten()[-MAX_RANK:]
    kept = kept if len(kept) else torch.tensor([len(values) - 1])
    return vectors[:, kept].float().contiguous(), (gain[kept] - 1).float()


def _folder() -> Path:
    return data_folder() / "lineages"


def _find(digest: str) -> Path | None:
    """The lineage in the user's data folder that a model belongs to."""
    for file in sorted(_folder().glob("*/lineage.json")):
        if digest in Lineage(file.parent).record.models:
            return file.parent
    return None


def _shapes_digest(measured: Measurement, roles: Mapping[str, TensorRole]) -> str:
    names = [[name, roles[name].template, measured.counts[name]] for name in sorted(roles)]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
