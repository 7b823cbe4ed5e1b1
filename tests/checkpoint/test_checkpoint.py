import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpunlearn.checkpoint import (
    COMPANIONS,
    Checkpoint,
    TensorDirectory,
    TensorWriter,
    checkpoint_digest,
    copy_companions,
    without_paths,
)
from mpunlearn.errors import CheckpointError, FileError
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
    shard = path / "model-00001-of-00001.safetensors"
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
        file.unlink()
        write_json(index, {"weight_map": [1]})
    elif how == "index not json":
        file.unlink()
        index.write_text("{")
    elif how == "index and single file":
        write_json(index, {"weight_map": dict.fromkeys(names, file.name)})
    elif how == "index leaves the folder":
        file.rename(shard)
        write_json(index, {"weight_map": dict.fromkeys(names, f"../{path.name}/{shard.name}")})
    elif how == "index names a missing shard":
        file.unlink()
        write_json(index, {"weight_map": dict.fromkeys(names, shard.name)})
    elif how == "index names a missing tensor":
        file.rename(shard)
        write_json(index, {"weight_map": {**dict.fromkeys(names, shard.name), "model.extra": shard.name}})
    elif how == "index forgets a tensor":
        file.rename(shard)
        write_json(index, {"weight_map": dict.fromkeys(names[1:], shard.name)})
    elif how == "fp8":
        save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, file)
    else:
        raise AssertionError(how)


DAMAGES = {
    "no config": "found no config.json",
    "config not json": "config.json: cannot be read as JSON",
    "config a list": "config.json: expected a JSON object, found list",
    "truncated": "model.safetensors: not a complete safetensors file",
    "header cut": "model.safetensors: not a complete safetensors file",
    "empty file": "model.safetensors: not a complete safetensors file",
    "header length absurd": "model.safetensors: not a complete safetensors file",
    "pickle": "contains pytorch_model.bin, but only safetensors files are opened",
    "pickle named safetensors": "model.safetensors: not a complete safetensors file",
    "nothing": "expected model.safetensors or model.safetensors.index.json in this directory, found neither",
    "no tensors": "contains no tensors",
    "index not a map": "index.json: expected a `weight_map`",
    "index not json": "index.json: cannot be read as JSON",
    "index and single file": "contains both",
    "index leaves the folder": "expected a .safetensors file in the same directory",
    "index names a missing shard": "model-00001-of-00001.safetensors: missing",
    "index names a missing tensor": "index.json: does not match its shards in model.extra",
    "index forgets a tensor": "index.json: does not match its shards in ",
    "fp8": "contains tensors of dtype F8_E4M3",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_checkpoints_are_refused_with_the_place_of_the_damage(save_tiny, how: str) -> None:
    path = save_tiny()
    Checkpoint(path)
    damaged(path, how)
    with pytest.raises(CheckpointError, match=f"{path}.*{re.escape(DAMAGES[how])}"):
        Checkpoint(path)


def test_a_file_or_nothing_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="found a file"):
        Checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match="found nothing at that path$"):
        Checkpoint(tmp_path / "nothing")


def test_a_path_like_a_name_on_the_hub_says_how_to_download_the_model(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "models are not downloaded.*run `hf download Qwen/Qwen2.5-0.5B --local-dir DIR` and give DIR"
    with pytest.raises(CheckpointError, match=f"nothing at that path; {hint}"):
        Checkpoint("Qwen/Qwen2.5-0.5B")


def test_a_writer_must_be_given_what_was_announced(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (2, 3))}
    with pytest.raises(ValueError, match="never written: a"), TensorWriter(tmp_path, specs):
        pass
    (tmp_path / "model.safetensors").unlink()
    with (
        pytest.raises(ValueError, match=r"a: expected .* \(2, 3\), found .* \(3, 2\)"),
        TensorWriter(tmp_path, specs) as w,
    ):
        w.write("a", torch.zeros(3, 2))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="a: expected rows of"), TensorWriter(tmp_path, specs) as writer:
        writer.write_rows("a", 1, torch.zeros(2, 3))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(DTYPES), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_a_tensor_written_and_read_in_parts_is_the_whole_tensor(tmp_path_factory, parts, dtype, width: int) -> None:
    folder = tmp_path_factory.mktemp("parts")
    tensor = (10 * torch.randn(sum(parts), width)).to(dtype)
    slices = [(sum(parts[:i]), sum(parts[: i + 1])) for i in range(len(parts))]
    with TensorWriter(folder, {"a": (dtype, tuple(tensor.shape))}) as writer:
        for start, stop in reversed(slices):
            writer.write_rows("a", start, tensor[start:stop])
    read = TensorDirectory(folder)
    assert torch.equal(read.read("a"), tensor)
    for start, stop in slices:
        out = torch.empty(stop - start, width, dtype=dtype)
        assert torch.equal(read.read_rows("a", start, stop, out=out), tensor[start:stop])
        assert torch.equal(out, tensor[start:stop])


def test_a_shard_that_shrinks_while_it_is_open_is_named(save_tiny) -> None:
    path = save_tiny()
    source = Checkpoint(path)
    name = max(source.tensors, key=lambda name: source.tensors[name].offset)
    os.truncate(path / "model.safetensors", source.tensors[name].offset + 3)
    with pytest.raises(CheckpointError, match=f"model.safetensors: ends within {name}; copy the file again"):
        source.read(name)
    with pytest.raises(CheckpointError, match="has no tensor model.nothing"):
        source.read("model.nothing")


def test_what_says_where_its_owner_keeps_files_is_not_carried_over(save_tiny, tmp_path: Path) -> None:
    path, target = save_tiny(), tmp_path / "target"
    target.mkdir()
    config = read_json(path / "tokenizer_config.json")
    paths = {"name_or_path": "someone/model", "vocab_file": "/home/ada/vocab", "a": "~/b", "c": "C:\\d"}
    write_json(path / "tokenizer_config.json", {**config, **paths})
    (path / "optimizer.pt").write_text("x")
    copy_companions(path, target)
    assert read_json(target / "tokenizer_config.json") == without_paths(config)
    assert {file.name for file in target.iterdir()} <= set(COMPANIONS)
    assert (target / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    (path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FileError, match="tokenizer_config.json: expected a JSON object"):
        copy_companions(path, target)


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
    with pytest.raises(FileError, match="already exists"), new_directory(target):
        pass
    assert (target / "file").read_text() == "x"


def test_a_json_file_of_impossible_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(FileError, match=f"more than {MAX_JSON_BYTES} bytes"):
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
