"""LoRA adapters, as PEFT saves them, are valid updates. PEFT itself says what each of them means."""

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.conftest import tiny_model
from tests.interop.reference import check

from mpunlearn import Perturbation, postprocess, preprocess
from mpunlearn.errors import UpdateError
from mpunlearn.protocol.exchange import CARD, ReceivedUpdate


def peft_options() -> list[str]:
    """The names of PEFT's own options."""
    import dataclasses

    import peft

    return [field.name for field in dataclasses.fields(peft.LoraConfig)]


pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]  # PEFT warns of its own defaults

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"target_modules": "all-linear"}),
    "rank-stabilized": ("qwen2", {}, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 20, "up_proj": 3},
        },
    ),
    "head in full": ("gpt_neox", {}, {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}),
    "norm in full": ("gemma", {"head_dim": 8}, {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm"]}),
    "biases": ("phi", {}, {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "embedding": ("llama", {}, {"target_modules": ["embed_tokens", "k_proj"]}),
    "fused": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "experts": (
        "qwen3_moe",
        {"num_experts": 3, "moe_intermediate_size": 12, "head_dim": 8},
        {"target_modules": ["v_proj"]},
    ),
}


def adapters(copies: list[Path], out: Path, **options: Any) -> list[Path]:
    """An adapter of each copy, with random factors and weights, saved by PEFT."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    for copy in copies:
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(copy), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(out / copy.name)
    return [out / copy.name for copy in copies]


def merged(copies: list[Path], given: list[Path], out: Path) -> list[Path]:
    """What PEFT makes of the adapters, as whole checkpoints."""
    import peft
    from transformers import AutoModelForCausalLM

    for copy, adapter in zip(copies, given, strict=True):
        model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
        peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out / copy.name)
    return [out / copy.name for copy in copies]


def publish(model: Path, tmp_path: Path) -> list[Path]:
    return preprocess(
        model, state=tmp_path / "state", out=tmp_path / "copies", perturbation=Perturbation(copies=2)
    ).copies


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_the_update_that_peft_merges(save_tiny, tmp_path: Path, case: str) -> None:
    model_type, sizes, options = CASES[case]
    model = save_tiny(model_type=model_type, num_key_value_heads=4, **sizes)
    copies = publish(model, tmp_path)
    given = adapters(copies, tmp_path / "adapters", **options)
    whole = merged(copies, given, tmp_path / "merged")
    check(model, tmp_path / "state", copies, given, whole, tmp_path / "final")


def test_the_client_audits_an_adapter_as_the_update_that_it_is(save_tiny, tmp_path: Path) -> None:
    from mpunlearn.client.audit.subject import Subject

    (copy, other) = publish(save_tiny(), tmp_path)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    (given,) = adapters([copy], tmp_path / "adapters", **options)
    (whole,) = merged([copy], [given], tmp_path / "merged")
    one, two = Subject(copy, given), Subject(copy, whole)
    assert one.names == two.names == {"lm_head.weight", *(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))}
    for name in one.names:
        torch.testing.assert_close(one.delta(name), two.delta(name), rtol=1e-4, atol=1e-6)
    with pytest.raises(UpdateError, match="belongs to copy 1 of 2"):
        Subject(other, given)


def test_a_bfloat16_adapter_of_a_bfloat16_copy(save_tiny, tmp_path: Path) -> None:
    model = save_tiny(dtype=torch.bfloat16)
    copies = publish(model, tmp_path)
    given = adapters(copies, tmp_path / "adapters", target_modules="all-linear")
    for adapter in given:
        file = adapter / "adapter_model.safetensors"
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    whole = merged(copies, given, tmp_path / "merged")
    check(model, tmp_path / "state", copies, given, whole, tmp_path / "final")


def test_the_copy_is_known_from_its_config_when_the_base_is_elsewhere(save_tiny, tmp_path: Path) -> None:
    """A client trains elsewhere: the adapter names a path that the server does not have."""
    model = save_tiny()
    copies = publish(model, tmp_path)
    given = adapters(copies, tmp_path / "adapters", target_modules=["q_proj"])
    for adapter in given:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/not/here"}))
    with pytest.raises(UpdateError, match=r"copy that copy's config\.json into this directory"):
        postprocess(given, state=tmp_path / "state", out=tmp_path / "final")
    for copy, adapter in zip(copies, given, strict=True):
        shutil.copy(copy / "config.json", adapter)
    whole = merged(copies, given, tmp_path / "merged")
    check(model, tmp_path / "state", copies, given, whole, tmp_path / "final")


def test_two_copies_are_never_confused(save_tiny, tmp_path: Path) -> None:
    copies = publish(save_tiny(), tmp_path)
    given = adapters(copies, tmp_path / "adapters", target_modules=["q_proj"])
    shutil.copy(copies[1] / "config.json", given[0])
    with pytest.raises(UpdateError, match="is that of copy 2 of 2.*is copy 1 of 2"):
        postprocess(given, state=tmp_path / "state", out=tmp_path / "final")
    (given[0] / "config.json").unlink()
    with pytest.raises(UpdateError, match="copy 1, and so does"):
        postprocess([given[0], given[0]], state=tmp_path / "state", out=tmp_path / "final")
    shutil.copy(copies[0] / "model.safetensors", given[0])
    with pytest.raises(UpdateError, match="both an adapter and a whole model"):
        postprocess(given, state=tmp_path / "state", out=tmp_path / "final")
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True.*merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"an_option_of_next_year": 3}, "an_option_of_next_year"),
        ({"peft_type": "LOHA"}, "expected peft_type LORA, found 'LOHA'"),
        ({"lora_alpha": "6"}, "lora_alpha: expected a number"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern.*regular expressions"),
    ],
)
def test_an_adapter_that_is_no_product_of_two_factors_is_refused(
    save_tiny, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    copies = publish(save_tiny(), tmp_path)
    given = adapters(copies, tmp_path / "adapters", target_modules=["q_proj"])
    config = json.loads((given[1] / "adapter_config.json").read_text())
    (given[1] / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UpdateError, match=message):
        postprocess(given, state=tmp_path / "state", out=tmp_path / "final")
    assert not (tmp_path / "final").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of a copy whose weights are not needed, and so are not there."""
    folder = tmp_path_factory.mktemp("adapter")
    card = {"run": "0" * 32, "round": 1, "copy": 1, "copies": 2}
    config = tiny_model("llama").config.to_dict()
    (folder / "config.json").write_text(json.dumps({**config, CARD: card}, default=str))
    factors = {"A": torch.ones(4, 32), "B": torch.ones(32, 4)}
    names = {letter: f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB"}
    save_file({names[letter]: value for letter, value in factors.items()}, folder / "adapter_model.safetensors")
    return folder


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("x" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@hypothesis.given(st.dictionaries(st.sampled_from([*peft_options(), "new"]), VALUES, max_size=4))
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_configuration_is_read_or_refused(adapter: Path, changes: dict[str, Any]) -> None:
    plain = {"peft_type": "LORA", "lora_alpha": 6, "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps({**plain, **changes}))
    try:
        update = ReceivedUpdate.open(adapter)
    except UpdateError:
        return
    name = "model.layers.0.self_attn.q_proj.weight"
    assert set(update.tensors.tensors) == {f"{name}.lora_A", f"{name}.lora_B"}
    assert bool(update.tensors.read(f"{name}.lora_B").isfinite().all())


def test_a_shared_embedding_and_a_missing_factor_are_refused(save_tiny, tmp_path: Path) -> None:
    copies = publish(save_tiny(model_type="gemma", head_dim=8), tmp_path)
    given = adapters(copies, tmp_path / "tied", target_modules=["embed_tokens"])
    with pytest.raises(UpdateError, match="which the LM head shares"):
        postprocess(given, state=tmp_path / "state", out=tmp_path / "final")
    given = adapters(copies, tmp_path / "adapters", target_modules=["q_proj"])
    file = given[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "0.self_attn.q_proj.lora_A" not in name}, file)
    with pytest.raises(UpdateError, match="without"):
        postprocess(given, state=tmp_path / "state", out=tmp_path / "final")


def test_an_adapter_of_a_model_that_is_no_copy(save_tiny, tmp_path: Path) -> None:
    model = save_tiny()
    publish(model, tmp_path)
    given = adapters([model], tmp_path / "adapters", target_modules=["q_proj"])
    with pytest.raises(UpdateError, match="does not say which copy"):
        postprocess(given, state=tmp_path / "state", out=tmp_path / "final")
