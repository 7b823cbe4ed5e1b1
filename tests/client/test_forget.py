"""`forget`: the model plus the update that `unlearn` gives, for weights and for LoRA factors."""

from pathlib import Path

import pytest
import torch

from mpunlearn import Training, forget, unlearn
from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.errors import FileError
from mpunlearn.lm.model import load


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_result_is_the_model_plus_its_update(save_tiny, tmp_path: Path, examples, lora_rank: int) -> None:
    model, (forget_set, retain_set) = save_tiny(dtype=torch.bfloat16), examples
    training = Training(objective="grad-diff", epochs=1, learning_rate=1e-2, batch_size=4, lora_rank=lora_rank)
    data = {"forget": forget_set, "retain": retain_set, "training": training}
    unlearn(model, out=tmp_path / "update", **data)
    result = Checkpoint(forget(model, out=tmp_path / "result", **data))
    source, update = Checkpoint(model), TensorDirectory(tmp_path / "update", stem="update")
    changed = 0
    for name, info in source.tensors.items():
        expected = source.read(name).float()
        if name in update.tensors:
            expected += update.read(name)
        elif f"{name}.lora_A" in update.tensors:
            expected += update.read(f"{name}.lora_B") @ update.read(f"{name}.lora_A")
        torch.testing.assert_close(result.read(name).float(), expected.to(info.dtype).float(), rtol=1e-2, atol=1e-5)
        changed += not torch.equal(result.read(name), source.read(name))
    assert changed > 4
    assert load(tmp_path / "result")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".result")) == []


def test_an_existing_folder_is_left_alone(save_tiny, tmp_path: Path, examples) -> None:
    model, (forget_set, _) = save_tiny(), examples
    (tmp_path / "result").mkdir()
    with pytest.raises(FileError, match="already exists"):
        forget(model, forget=forget_set, out=tmp_path / "result", training=Training(objective="grad-ascent"))
    assert list((tmp_path / "result").iterdir()) == []
