import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpunlearn.checkpoint import Checkpoint, TensorDirectory, TensorWriter, checkpoint_digest
from mpunlearn.errors import CheckpointError
from mpunlearn.files import MAX_JSON_BYTES, new_directory, read_json, write_json

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


@given(
    st.dictionaries(
        st.text("abc.0123456789", min_size=1, max_size=12),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 400),
)
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path_factory, specs, limit: int) -> None:
    folder = tmp_path_factory.mktemp("round-trip")
    tensors = {name: (10 * torch.randn(shape)).to(dtype) for name, (dtype, shape) in specs.items()}
    with TensorWriter(
        folder, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, max_shard_bytes=limit
    ) as writer:
        for name in sorted(tensors, reverse=True):
            writer.write(name, tensors[name])
    read = TensorDirectory(folder)
    library = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(read.tensors) == set(library) == set(tensors)
    for name, tensor in tensors.items():
        assert read.read(name).dtype == tensor.dtype
        assert torch.equal(read.read(name), tensor)
        assert torch.equal(library[name], tensor)


def test_shards_are_indexed_as_transformers_expects(save_tiny) -> None:
    from transformers import AutoModelForCausalLM

    whole, sharded = save_tiny("whole"), save_tiny("sharded", max_shard_size="30KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    assert checkpoint_digest(whole) == checkpoint_digest(sharded)
    source = Checkpoint(sharded)
    out = whole.parent / "again"
    with new_directory(out) as folder:
        specs = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
        write_json(folder / "config.json", source.config)
        with TensorWriter(folder, specs, max_shard_bytes=20_000) as writer:
            for name in specs:
                writer.write(name, source.read(name))
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert checkpoint_digest(out) == checkpoint_digest(whole)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.state_dict()["model.norm.weight"], source.read("model.norm.weight"))


def damaged(path: Path, how: str) -> None:
    """Turns a good checkpoint with one shard into a bad one."""
    file, index = path / "model.safetensors", path / "model.safetensors.index.json"
    data = file.read_bytes()
    names = list(load_file(file))
    if how == "no config":
        (path / "config.json").unlink()
    elif how == "config not json":
        (path / "config.json").write_text("{")
    elif how == "config a list":
        (path / "config.json").write_text("[]")
    elif how == "truncated":
        file.write_bytes(data[:-7])
    elif how == "header cut":
        file.write_bytes(data[:50])
    elif how == "empty file":
        file.write_bytes(b"")
    elif how == "header length absurd":
        file.write_bytes((1 << 62).to_bytes(8, "little") + data[8:])
    elif how == "pickle":
        file.unlink()
        torch.save({}, path / "pytorch_model.bin")
    elif how == "pickle named safetensors":
        torch.save({"x": torch.zeros(3)}, file)
    elif how == "nothing":
        file.unlink()
    elif how == "no tensors":
        save_file({}, file)
    elif how == "index not a map":
        write_json(index, {"weight_map": [1]})
    elif how == "index leaves the folder":
        write_json(index, {"weight_map": dict.fromkeys(names, "../model.safetensors")})
    elif how == "index names a missing shard":
        write_json(index, {"weight_map": dict.fromkeys(names, "model-1.safetensors")})
    elif how == "index names a missing tensor":
        write_json(index, {"weight_map": {**dict.fromkeys(names, file.name), "model.extra": file.name}})
    elif how == "index forgets a tensor":
        write_json(index, {"weight_map": dict.fromkeys(names[1:], file.name)})
    elif how == "fp8":
        save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, file)
    else:
        raise AssertionError(how)


DAMAGES = """no config|config not json|config a list|truncated|header cut|empty file|header length absurd|pickle
pickle named safetensors|nothing|no tensors|index not a map|index leaves the folder|index names a missing shard
index names a missing tensor|index forgets a tensor|fp8""".replace("\n", "|").split("|")


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_checkpoints_are_refused_with_the_place_of_the_damage(save_tiny, how: str) -> None:
    path = save_tiny()
    damaged(path, how)
    with pytest.raises(CheckpointError, match=str(path)):
        Checkpoint(path)


def test_a_file_or_nothing_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="found a file"):
        Checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match="nothing at that path"):
        Checkpoint(tmp_path / "nothing")


def test_a_writer_must_be_given_what_was_announced(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (2, 3))}
    with pytest.raises(ValueError, match="never written: a"), TensorWriter(tmp_path, specs):
        pass
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="announced"), TensorWriter(tmp_path, specs) as writer:
        writer.write("a", torch.zeros(3, 2))


def test_new_directories_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with pytest.raises(RuntimeError), new_directory(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    (target.parent / ".target.partial").mkdir()
    (target.parent / ".target.partial" / "left by a killed process").write_text("x")
    with new_directory(target, mode=0o700) as folder:
        assert not target.exists()
        (folder / "file").write_text("x")
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert target.stat().st_mode & 0o777 == 0o700
    with pytest.raises(CheckpointError, match="exists already"), new_directory(target):
        pass
    assert (target / "file").read_text() == "x"


def test_a_json_file_of_impossible_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"more than {MAX_JSON_BYTES} bytes"):
        read_json(tmp_path / "x.json")


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1}, mode=0o600)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_nothing_behind(save_tiny, tmp_path: Path) -> None:
    """A real write error: the operating system refuses files beyond a size."""
    path = save_tiny()
    script = (
        "import resource, signal, sys; from mpunlearn.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    out, state = tmp_path / "copies", tmp_path / "state"
    before = sorted(os.listdir(tmp_path))
    arguments = ["preprocess", str(path), "--state", str(state), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == before
