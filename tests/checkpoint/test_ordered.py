import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.checkpoint import header as headers
from mpunlearn.checkpoint.ordered import FileHasher, InOrder


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(0, 1000), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_parts_are_passed_on_in_order_whoever_brings_them_when(lengths: list[int], seed: int, threads: int) -> None:
    data = random.Random(seed).randbytes(sum(lengths))
    parts = [(sum(lengths[:i]), memoryview(data)[sum(lengths[:i]) :][:length]) for i, length in enumerate(lengths)]
    parts += random.Random(seed).choices(parts, k=3) if parts else []  # some of them twice
    random.Random(seed).shuffle(parts)
    passed: list[bytes] = []
    order = InOrder(lambda part: passed.append(bytes(part)), lambda start, part: lambda: (memoryview(bytes(part)),))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: order.add(*part), parts))
    assert b"".join(passed) == data
    assert order.next == len(data)


@given(st.sets(st.integers(0, 9)), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_the_digest_of_a_file_that_was_read_in_part(tmp_path_factory, left_out: set[int], seed: int) -> None:
    path = tmp_path_factory.mktemp("hashed") / "file"
    data = random.Random(seed).randbytes(1003)
    path.write_bytes(data)
    hasher, starts = FileHasher(path, len(data)), [start for start in range(10) if start not in left_out]
    random.Random(seed).shuffle(starts)
    for start in starts:
        hasher.add(100 * start, memoryview(data)[100 * start :][:100])
    assert hasher.hexdigest() == hashlib.sha256(data).hexdigest()


def test_digests_on_the_way_are_those_of_the_files(save_tiny, tmp_path: Path) -> None:
    source = Checkpoint(save_tiny(max_shard_size="30KB"), hashed=True)
    specs = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    with TensorWriter(tmp_path, specs, max_shard_bytes=20_000) as writer:
        for name in sorted(specs, key=lambda name: name[::-1]):
            writer.write(name, source.read(name))
    for folder, digests in ((tmp_path, writer.digests), (source.path, source.digests())):
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
        assert digests == files
        assert len(files) > 2


def test_a_shard_in_a_store_is_refused_unless_its_tensors_fill_it() -> None:
    good = b'{"__metadata__":{},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    headers._check_header(good, 8)
    for header, size in (
        (good, 9),
        (good.replace(b"[0,8]", b"[4,12]"), 12),
        (good.replace(b"[2]", b"[3]"), 8),
        (b'{"a":1}', 0),
        (b"[]", 0),
    ):
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
            headers._check_header(header, size)
