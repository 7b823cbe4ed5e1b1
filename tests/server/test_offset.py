"""The secret offset: the same in all copies, rounds and runs of a lineage, independent between lineages, never disclosed."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from mpunlearn import Perturbation, postprocess, preprocess
from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorWriter, copy_companions
from mpunlearn.errors import PlanError, StateError
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import CARD, Card, derived_config
from mpunlearn.server.lineage import UNSHAPED_LEVEL, VECTOR_LEVEL, Lineage, Moments, whitening_of
from mpunlearn.server.noise import measure
from mpunlearn.server.offset import DAMPING
from mpunlearn.server.publisher import Publisher
from mpunlearn.server.state import ServerState

PLAIN = Perturbation(copies=1, kappa=0.0, reparameterization="none", common_noise=0.1, common_noise_shape="gauss")
NOISY = Perturbation(copies=3, kappa=0.05, reparameterization="full", common_noise=0.1, common_noise_shape="gauss")


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {name: checkpoint.read(name).double() for name in Architecture.of(checkpoint).tensor_roles(checkpoint)}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one[name] - other[name] for name in one}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Up to the rounding of float32."""
    return norm(difference(one, other)) < 1e-5 * norm(one)


def offset_of(model: Path, folder: Path, lineage: Path | None = None) -> dict[str, torch.Tensor]:
    """c, read off a copy without noise and without reparameterization."""
    published = preprocess(model, state=folder / "s", out=folder / "c", perturbation=PLAIN, lineage=lineage)
    return difference(weights(published.copies[0]), weights(model))


def changed(model: Path, out: Path, by: float = 0.3) -> Path:
    """A model of the same shapes with other weights."""
    source = Checkpoint(model)
    specs = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    torch.manual_seed(3)
    with new_directory(out) as folder:
        copy_companions(model, folder)
        write_json(folder / "config.json", derived_config(source.config, specs))
        with TensorWriter(folder, specs) as writer:
            for name in specs:
                value = source.read(name)
                writer.write(name, value + by * value.std() * torch.randn_like(value))
    return out


def update(copy: Path, out: Path, size: float = 1e-3) -> Path:
    """A random update of every tensor of a copy."""
    source = Checkpoint(copy)
    specs = {name: (torch.float32, info.shape) for name, info in source.tensors.items()}
    torch.manual_seed(5)
    with new_directory(out) as folder:
        write_json(folder / "update.json", {CARD: source.config[CARD]})
        with TensorWriter(folder, specs, stem="update") as writer:
            for name, (_, shape) in specs.items():
                writer.write(name, size * torch.randn(shape))
    return out


def test_the_offset_belongs_to_the_lineage(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    first, again = (offset_of(model, tmp_path / name) for name in ("run", "another run"))
    assert norm(first) == pytest.approx(0.1 * norm(weights(model)), rel=0.05)
    assert close(first, again)
    other = offset_of(model, tmp_path / "third", tmp_path / "another lineage")
    inner = sum(float((first[name] * other[name]).sum()) for name in first)
    assert abs(inner) < 0.05 * norm(first) * norm(other)


def test_all_copies_share_it_and_the_floor_is_its_size(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    offset = offset_of(model, tmp_path / "plain")
    published = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=NOISY)
    state, theta = ServerState(tmp_path / "s"), weights(model)
    architecture = Architecture.of(Checkpoint(model))
    roles = architecture.tensor_roles(Checkpoint(model))
    publisher = Publisher(state.secret, state.rounds[0], architecture)
    mean = {name: torch.zeros_like(value) for name, value in theta.items()}
    for copy, maps, weight in zip(published.copies, publisher.maps, publisher.design.weights, strict=True):
        tensors = Checkpoint(copy)
        for name, role in roles.items():
            mean[name] += weight * maps.invert(role, tensors.read(maps.published_name(name, role)).double())
    assert close(difference(mean, theta), offset)  # the noise cancels, the offset stays
    assert published.offset is not None
    assert published.offset.floor == pytest.approx(norm(offset) / norm(theta), rel=0.05)
    assert "10.0%" in published.summary()
    assert published.to_json()["floor"] == published.offset.floor


def test_updates_are_applied_to_the_model_and_successors_stay_in_the_lineage(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    copy = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=PLAIN).copies[0]
    result = postprocess([update(copy, tmp_path / "u")], state=tmp_path / "s", out=tmp_path / "final")
    theta, final = weights(model), weights(result)
    given = _update(tmp_path / "u")
    for name in theta:
        expected = (theta[name] + given[name]).float()
        assert torch.equal(final[name].float(), expected)
    assert close(offset_of(model, tmp_path / "old"), offset_of(result, tmp_path / "new"))


def _update(path: Path) -> dict[str, torch.Tensor]:
    from mpunlearn.checkpoint import TensorDirectory

    tensors = TensorDirectory(path, stem="update")
    return {name: tensors.read(name) for name in tensors.tensors}


def test_a_trained_checkpoint_is_compared_with_the_stand_in(save_tiny, tmp_path: Path) -> None:
    model, stand_in = save_tiny(), changed(save_tiny("other"), tmp_path / "stand-in")
    copy = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=NOISY, stand_in=stand_in).copies[0]
    trained = []
    for number in (1, 2, 3):
        source = Checkpoint(copy.parent / f"copy-{number}")
        specs = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
        with new_directory(tmp_path / f"t{number}") as folder:
            copy_companions(source.path, folder)
            write_json(folder / "config.json", source.config)
            with TensorWriter(folder, specs) as writer:
                for name in specs:
                    writer.write(name, source.read(name))
        trained.append(tmp_path / f"t{number}")
    result = postprocess(trained, state=tmp_path / "s", out=tmp_path / "final")
    assert close(weights(result), weights(model))  # copies that nobody trained change nothing


def test_a_stand_in_keeps_its_distance_in_every_round(save_tiny, tmp_path: Path) -> None:
    model, plain = save_tiny(), dataclasses.replace(PLAIN, common_noise=0.0)
    stand_in, theta = changed(model, tmp_path / "stand-in"), model
    offsets = []
    for number in (1, 2):
        copy = preprocess(
            theta, state=tmp_path / "s", out=tmp_path / f"c{number}", perturbation=plain, stand_in=stand_in
        ).copies[0]
        offsets.append(difference(weights(copy), weights(theta)))
        sent = update(copy, tmp_path / f"u{number}")
        theta = postprocess([sent], state=tmp_path / "s", out=tmp_path / f"m{number}")
    assert close(offsets[0], difference(weights(stand_in), weights(model)))
    assert close(*offsets)


@pytest.mark.parametrize(
    "later", [{"stand_in": None}, {"stand_in": "another"}, {"perturbation": NOISY}, {"perturbation": None}]
)
def test_a_later_round_cannot_have_another_offset(save_tiny, tmp_path: Path, later) -> None:
    model = save_tiny()
    for name, by in (("stand-in", 0.3), ("another", 0.2)):
        changed(model, tmp_path / name, by)
    plain = dataclasses.replace(NOISY, common_noise=0.2)
    first = {"perturbation": plain, "stand_in": tmp_path / "stand-in"}
    copies = preprocess(model, state=tmp_path / "s", out=tmp_path / "c1", **first).copies
    result = postprocess(
        [update(copy, tmp_path / f"u-{copy.name}") for copy in copies], state=tmp_path / "s", out=tmp_path / "m"
    )
    if later.get("stand_in"):
        later = {"stand_in": tmp_path / later["stand_in"]}
    with pytest.raises(StateError, match="round 1 had"):
        preprocess(result, state=tmp_path / "s", out=tmp_path / "c2", **{**first, **later})
    assert not (tmp_path / "c2").exists()


def test_levels_in_use_do_not_change(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    offset_of(model, tmp_path / "first")
    with pytest.raises(PlanError, match=r"used with 0.1 \(gauss\)"):
        preprocess(
            model, state=tmp_path / "s", out=tmp_path / "c", perturbation=dataclasses.replace(PLAIN, common_noise=0.2)
        )
    automatic = dataclasses.replace(PLAIN, common_noise="auto")
    published = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=automatic)
    assert published.offset is not None
    assert published.offset.common is not None
    assert published.offset.common.level == 0.1


def test_whitened_noise_has_the_stated_size_and_spares_frequent_inputs(save_tiny, tmp_path: Path) -> None:
    """With the moments of one layer only, as in lineages of earlier calibrations, which had none of the embedding."""
    model = save_tiny(hidden_size=64, intermediate_size=96)
    source = Checkpoint(model)
    roles = Architecture.of(source).tensor_roles(source)
    measured = measure(source, None, roles)
    lineage = Lineage.of(measured, roles, tmp_path / "lineage")
    torch.manual_seed(1)
    directions = torch.linalg.qr(torch.randn(64, 64)).Q
    moment = directions @ torch.diag(torch.logspace(0, -5, 64)) @ directions.T
    name = "model.layers.0.self_attn.q_proj.weight"
    lineage.keep_moments(Moments({name: 0}, [moment]))
    lineage.pin(lineage.levels(0.1, "whitened", measured, roles))
    whitened = dataclasses.replace(PLAIN, common_noise="auto")
    copy = preprocess(
        model, state=tmp_path / "s", out=tmp_path / "c", perturbation=whitened, lineage=tmp_path / "lineage"
    ).copies[0]
    offset = difference(weights(copy), weights(model))
    assert offset[name].norm() / source.read(name).norm() == pytest.approx(0.1, rel=0.1)
    along = (offset[name] @ directions.double()).square().mean(0)
    expected = 1 / (torch.logspace(0, -5, 64).double() + DAMPING)
    expected *= along.sum() / expected.sum()
    assert along[:8].sum() / expected[:8].sum() == pytest.approx(1, rel=0.5)
    assert along[0] < 0.01 * along[-1]
    for other, level in (("model.embed_tokens.weight", UNSHAPED_LEVEL), ("model.norm.weight", VECTOR_LEVEL)):
        assert offset[other].norm() / source.read(other).norm() == pytest.approx(level, rel=0.3)


def test_a_whitening_matrix_is_the_inverse_root() -> None:
    torch.manual_seed(2)
    factor = torch.randn(24, 24, dtype=torch.float64) * torch.logspace(0, -3, 24, dtype=torch.float64)
    moment = factor @ factor.T
    vectors, values = (tensor.double() for tensor in whitening_of(moment))
    matrix = torch.eye(24, dtype=torch.float64) + vectors @ torch.diag(values) @ vectors.T
    share = moment / torch.linalg.eigvalsh(moment)[-1] + DAMPING * torch.eye(24, dtype=torch.float64)
    product = matrix @ share @ matrix / DAMPING
    assert torch.linalg.norm(product - torch.eye(24)) < 0.05 * math.sqrt(24)


@pytest.mark.parametrize("what", ["same", "other shapes"])
def test_a_stand_in_must_differ_and_have_the_same_shapes(save_tiny, tmp_path: Path, what: str) -> None:
    model = save_tiny()
    stand_in = model if what == "same" else save_tiny("wide", intermediate_size=48)
    with pytest.raises(StateError, match="hide nothing" if what == "same" else "same shapes"):
        preprocess(model, state=tmp_path / "s", out=tmp_path / "c", stand_in=stand_in)
    assert not (tmp_path / "s").exists()


def test_a_lineage_is_private_and_for_one_shape(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    offset_of(model, tmp_path / "run", tmp_path / "lineage")
    assert (tmp_path / "lineage").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "lineage" / "secret.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateError, match="other tensors"):
        offset_of(save_tiny("wide", intermediate_size=48), tmp_path / "wide", tmp_path / "lineage")
    (tmp_path / "lineage").chmod(0o755)
    with pytest.raises(StateError, match="chmod 700"):
        offset_of(model, tmp_path / "later", tmp_path / "lineage")


def test_nothing_that_crosses_contains_it(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    published = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=NOISY)
    assert published.offset is not None
    assert published.offset.lineage is not None
    secret = (Path(published.offset.lineage) / "secret.key").read_bytes()
    for file in (file for copy in published.copies for file in copy.rglob("*") if file.is_file()):
        content = file.read_bytes()
        assert secret not in content
        if file.suffix == ".json":
            assert not {b"common_noise", b"lineage", b"sigma", b"offset"} & set(content.split(b'"'))
    assert Card.of(Checkpoint(published.copies[0]).config) is not None
