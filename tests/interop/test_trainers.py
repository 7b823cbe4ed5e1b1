"""What other training tools make of a published copy is a valid update: TRL, the Trainer of transformers, PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.reference import check
from tests.interop.test_peft import merged, publish

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TEXTS = ["Ada Byron wrote about engines.", "Mary Shelley wrote about a creature.", "Who wrote about engines?"] * 4
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 3e-3,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def with_sft(copy: Path, out: Path, lora: bool) -> None:
    """TRL's SFTTrainer, which is given the path of the copy."""
    trl = pytest.importorskip("trl", reason="needs the extra `interop`")
    import peft
    from datasets import Dataset

    arguments = trl.SFTConfig(output_dir=str(out), max_length=32, **{**ARGUMENTS, "bf16": False})
    trainer = trl.SFTTrainer(
        model=str(copy),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    trainer.train()
    trainer.save_model(str(out))


def with_trainer(copy: Path, out: Path, lora: bool, dtype: torch.dtype | None = None, **saving: Any) -> None:
    """The Trainer of transformers, with a model that the user has loaded, and perhaps wrapped by PEFT."""
    import peft
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True))
    rows = [dict(tokenizer(text)) for text in TEXTS]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = transformers.TrainingArguments(output_dir=str(out), **ARGUMENTS)
    trainer = transformers.Trainer(model, arguments, collator, rows)
    trainer.train()
    if dtype is None and not saving:
        trainer.save_model(str(out))
    else:
        trainer.model.to(dtype or torch.float32).save_pretrained(out, **saving)


Train = Callable[[Path, Path], None]
CASES: dict[str, tuple[torch.dtype, bool, Train]] = {
    "SFTTrainer": (torch.float32, False, lambda copy, out: with_sft(copy, out, lora=False)),
    "SFTTrainer with LoRA": (torch.float32, True, lambda copy, out: with_sft(copy, out, lora=True)),
    "Trainer": (torch.float32, False, lambda copy, out: with_trainer(copy, out, lora=False)),
    "Trainer with LoRA": (torch.float32, True, lambda copy, out: with_trainer(copy, out, lora=True)),
    "sharded": (torch.float32, False, lambda copy, out: with_trainer(copy, out, False, max_shard_size="20KB")),
    "saved in bfloat16": (torch.bfloat16, False, lambda copy, out: with_trainer(copy, out, False, torch.bfloat16)),
    "saved in float16": (torch.bfloat16, False, lambda copy, out: with_trainer(copy, out, False, torch.float16)),
    "saved in float32": (torch.bfloat16, False, lambda copy, out: with_trainer(copy, out, False, torch.float32)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_trainer_saves_is_a_valid_update(save_tiny, tmp_path: Path, case: str) -> None:
    dtype, lora, train = CASES[case]
    model = save_tiny(dtype=dtype)
    copies = publish(model, tmp_path)
    given = [tmp_path / "trained" / copy.name for copy in copies]
    for copy, out in zip(copies, given, strict=True):
        train(copy, out)
    if case == "sharded":
        assert len(list(given[0].glob("model-*.safetensors"))) > 1
    whole = merged(copies, given, tmp_path / "merged") if lora else given
    check(model, tmp_path / "state", copies, given, whole, tmp_path / "final")
