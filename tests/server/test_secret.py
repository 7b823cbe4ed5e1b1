import hashlib
import hmac
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpunlearn.errors import StateError
from mpunlearn.server.secret import BLOCK, Secret, Stream
from mpunlearn.server.workspace import Workspace

SECRET = Secret(bytes(range(32)))


def slow_hkdf(key: bytes, info: bytes, length: int, salt: bytes = bytes(32)) -> bytes:
    """RFC 5869, sections 2.2 and 2.3, word for word."""
    pseudo_random_key = hmac.new(salt, key, hashlib.sha256).digest()
    block, out = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.new(pseudo_random_key, block + info + bytes([counter]), hashlib.sha256).digest()
        out += block
    return out[:length]


def test_hkdf_known_answers_of_rfc_5869() -> None:
    first = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    third = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    key, info = b"\x0b" * 22, bytes.fromhex("f0f1f2f3f4f5f6f7f8f9")
    salt = bytes.fromhex("000102030405060708090a0b0c")
    assert slow_hkdf(key, info, 42, salt).hex() == first
    assert HKDF(algorithm=SHA256(), length=42, salt=salt, info=info).derive(key).hex() == first
    assert slow_hkdf(key, b"", 42).hex() == third


def test_aes_256_counter_mode_known_answers_of_sp_800_38a() -> None:
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    cipher = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5")
    keystream = bytes(a ^ b for a, b in zip(plain, cipher, strict=True))
    assert bytes(Stream(key).read(32, start=16 * counter)) == keystream


def test_a_stream_is_hkdf_of_its_labels_and_counts_from_zero() -> None:
    info = b"s" + (5).to_bytes(4, "big") + b"noise" + b"i" + (1).to_bytes(4, "big") + b"3"
    expected = Stream(slow_hkdf(bytes(range(32)), info, 32)).read(64)
    assert SECRET.stream("noise", 3).read(64) == expected


labels = st.lists(st.one_of(st.text(max_size=4), st.integers(-3, 300)), min_size=1, max_size=4)


@given(labels, labels)
@settings(deadline=None)
def test_distinct_names_give_distinct_streams(a: list[str | int], b: list[str | int]) -> None:
    same = [(type(x), x) for x in a] == [(type(x), x) for x in b]
    assert (SECRET.stream(*a).read(32) == SECRET.stream(*b).read(32)) == same


def test_names_that_concatenate_alike_differ() -> None:
    streams = [("ab", "c"), ("a", "bc"), ("abc",), (1, 23), (12, 3), ("1", 23), (123,), ("123",)]
    assert len({bytes(SECRET.stream(*names).read(32)) for names in streams}) == len(streams)


@given(st.integers(0, 40), st.integers(1, 200))
def test_streams_are_seekable(block: int, count: int) -> None:
    stream = SECRET.stream("seek")
    assert stream.read(16 * block + count)[16 * block :] == stream.read(count, start=16 * block)


@given(st.integers(0, 7 * BLOCK), st.integers(0, 6 * BLOCK), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=30)
def test_normals_in_pieces_are_the_normals_at_once(start: int, count: int, dtype: torch.dtype) -> None:
    stream, workspace = SECRET.stream("pieces"), Workspace()
    whole = torch.cat([stream.normals(BLOCK, start=number * BLOCK) for number in range(14)]).to(dtype)
    for _ in range(2):  # the second time in memory that has been used
        part = stream.normals(count, start=start, out=torch.empty(count, dtype=dtype), workspace=workspace)
        assert torch.equal(part, whole[start : start + count])
    columns = stream.normals(count, start=start, out=torch.empty(count, 2, dtype=dtype)[:, 0])
    assert torch.equal(columns, whole[start : start + count])


@pytest.mark.slow
def test_normals_are_normal_in_the_middle_and_in_the_tails() -> None:
    sample = SECRET.stream("normality").normals(1 << 24).double()
    assert bool(torch.isfinite(sample).all())
    assert stats.kstest(sample[:: 1 << 4].numpy(), "norm").pvalue > 1e-3
    for threshold in (3.0, 4.0, 4.5, 5.0, 5.3):
        expected = len(sample) * 2 * stats.norm.sf(threshold)
        beyond = int((sample.abs() > threshold).sum())
        assert stats.poisson.cdf(beyond, expected) > 1e-4
        assert stats.poisson.sf(beyond - 1, expected) > 1e-4
    # Box-Muller makes pairs from one radius: they must not be correlated, nor their squares.
    pairs = sample.view(-1, 2, BLOCK // 2)
    for a, b in ((pairs[:, 0], pairs[:, 1]), (pairs[:, 0] ** 2, pairs[:, 1] ** 2), (sample[:-1], sample[1:])):
        correlation = float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_permutations_are_uniform() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for number in range(12_000):
        order = tuple(SECRET.stream("permutation", number).permutation(4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert sorted(SECRET.stream("long").permutation(5000).tolist()) == list(range(5000))


def test_signs_and_angles_are_uniform() -> None:
    signs = SECRET.stream("signs").signs(100_000)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / 100_000**0.5
    angles = SECRET.stream("angles").angles(100_000).numpy()
    assert stats.kstest(angles, "uniform", args=(0, 2 * np.pi)).pvalue > 1e-3


def test_orthogonal_matrices_are_orthogonal_and_haar() -> None:
    matrices = SECRET.stream("haar").orthogonal(4000, 3)
    identity = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(matrices @ matrices.transpose(1, 2), identity.expand_as(matrices), atol=1e-12)
    # An entry of a Haar matrix in three dimensions is uniform on [-1, 1], and both determinants occur equally often.
    assert stats.kstest(matrices[:, 1, 2].numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3
    assert abs(float(torch.linalg.det(matrices).mean())) < 5 / 4000**0.5


def test_a_secret_does_not_show_itself() -> None:
    key = b"\xa5" * 32
    secret = Secret(key)
    assert "a5" not in repr(secret)
    assert key.hex() not in str(secret)
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_key_files(tmp_path) -> None:
    path = tmp_path / "secret.key"
    secret = Secret.generate()
    secret.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Secret.load(path).stream("x").read(16) == secret.stream("x").read(16)
    assert Secret.generate().stream("x").read(16) != secret.stream("x").read(16)
    path.chmod(0o640)
    with pytest.raises(StateError, match="0600"):
        Secret.load(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(StateError, match="5 bytes"):
        Secret.load(path)
