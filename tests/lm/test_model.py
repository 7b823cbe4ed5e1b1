"""Loading checkpoints: quietly, from this machine alone, and with every failure as one kind of error."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.utils import logging

from mpunlearn.errors import CheckpointError, UnloadableError
from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.model import forward, load, load_model, load_tokenizer, nll, quiet


def test_loading_shows_no_bars_and_leaves_transformers_as_it_was(save_tiny, capfd) -> None:
    path = save_tiny()
    capfd.readouterr()
    transformers.AutoModelForCausalLM.from_pretrained(path)
    assert "Loading weights" in capfd.readouterr().err
    load(path)
    assert capfd.readouterr().err == ""
    transformers.AutoModelForCausalLM.from_pretrained(path)
    assert "Loading weights" in capfd.readouterr().err
    with pytest.raises(UnloadableError):
        load_model(_changed(path, {"vocab_size": 3}))
    assert "it/s" in _bar(capfd)


def test_quiet_hides_bars_within_its_block_only(capfd) -> None:
    quiet()  # without `with` it does nothing
    assert "2/2" in _bar(capfd)
    with quiet(), quiet():
        assert _bar(capfd) == ""
    assert "2/2" in _bar(capfd)
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    assert "2/2" in _bar(capfd)
    logging.disable_progress_bar()
    try:
        with quiet():
            pass
        assert _bar(capfd) == ""
    finally:
        logging.enable_progress_bar()


def _bar(capfd) -> str:
    for _ in logging.tqdm([1, 2]):
        pass
    return capfd.readouterr().err


def _changed(path: Path, change: dict) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    return path


LOAD_ALL = """
import sys
from pathlib import Path
from mpunlearn.errors import CheckpointError
from mpunlearn.lm.model import load_model, load_tokenizer
for load in (load_model, load_tokenizer):
    for path in sys.argv[1:]:
        try:
            load(Path(path))
        except CheckpointError as error:
            print(type(error).__name__, error)
"""

CONTROL = """
import sys
import transformers
try:
    transformers.AutoTokenizer.from_pretrained(sys.argv[1])
except OSError:
    pass
"""


@pytest.mark.slow
def test_loading_asks_the_hub_for_nothing(save_tiny, hub) -> None:
    """Neither for a path that does not exist, nor for the base model of an adapter beside the weights."""
    adapted = save_tiny("adapted")
    adapter = {"base_model_name_or_path": "someone/base", "peft_type": "LORA"}
    (adapted / "adapter_config.json").write_text(json.dumps(adapter))
    errors = hub.run(LOAD_ALL, "someone/model", str(adapted))
    assert hub.asked == []
    assert [error.split(" expected")[0] for error in errors if "someone/model" in error] == [
        "CheckpointError someone/model:"
    ] * 2
    hub.run(CONTROL, "someone/model")
    assert any("someone/model" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_attn_implementation": "somebody/kernel"},
            r"requests external code \(_attn_implementation = 'somebody/k",
        ),
        (
            {"text_config": {"experts_implementation": "a/b"}},
            r"requests external code \(experts_implementation = 'a/b'",
        ),
        ({"model_type": "unheard-of"}, "transformers cannot load its model"),
        ({"hidden_size": 33}, "transformers cannot load its model"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_kind_of_error(save_tiny, change: dict, message: str) -> None:
    path = _changed(save_tiny(), change)
    with pytest.raises(UnloadableError, match=f"{path}: .*{message}"):
        load_model(path)


def test_a_tokenizer_that_cannot_be_loaded_is_one_kind_of_error(save_tiny, tmp_path: Path) -> None:
    path = save_tiny()
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(UnloadableError, match=f"{path}: transformers cannot load its tokenizer"):
        load_tokenizer(path)
    with pytest.raises(CheckpointError, match="nothing at that path"):
        load_tokenizer(tmp_path / "nowhere")


def test_the_forward_pass_gives_the_whole_passs_logits_where_there_is_loss(save_tiny) -> None:
    model, tokenizer = load(save_tiny())
    examples = [Example([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), Example([9, 10, 11, 12], [IGNORED, 10, 11, 12])]
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in collate(examples, 2).items()}
    with torch.no_grad():
        output = forward(model, batch, layer=0)
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    assert output["targets"].tolist() == [[7, 8, IGNORED], [10, 11, 12]]
    for row, at in enumerate([(1, 2), (0, 1, 2)]):
        torch.testing.assert_close(output["logits"][row, : len(at)], whole.logits[row, list(at)])
        torch.testing.assert_close(output["hidden"][row, : len(at)], whole.hidden_states[1][row, list(at)])
    assert "hidden" not in forward(model, batch)
    by_hand = [
        -float(whole.logits[row, :-1].log_softmax(-1)[[p - 1 for p in at], [examples[row].labels[p] for p in at]].sum())
        for row, at in enumerate([(2, 3), (1, 2, 3)])
    ]
    assert nll(model, examples, 1, tokenizer) == pytest.approx(by_hand, rel=1e-5)
    assert nll(model, examples, 2, tokenizer) == pytest.approx(by_hand, rel=1e-5)
