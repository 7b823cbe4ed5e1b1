"""What runs on real models need, computed from their shapes: the table of the README.

Nothing is trained and no weight is read. The text is that of TOFU's forget10: 400 questions with answers, as many retain
examples as forget examples in each step, and 80 tokens with 60 of the answer for each (rounded up from TOFU's means under a
Llama tokenizer, chat template included). Training is NPO with the recommended values, all transformer layers, AdamW,
bfloat16 with gradient checkpointing, and micro-batches of 4. Minutes are floating-point operations divided by the rate that
is stated below, and were not measured: a step is four forward passes (one more because of checkpointing, two for the backward
pass). Loading models and writing updates come on top.

    python benchmarks/recipes.py
"""

from mpunlearn.planning.recommended import recommendation
from mpunlearn.planning.sizes import Shapes, network_disk
from mpunlearn.presets import PRESETS
from mpunlearn.protocol.plan import Training
from mpunlearn.tables import markdown
from shapes import MODELS

EXAMPLES, TOKENS, ANSWER_TOKENS = 400, 80, 60
MICRO_BATCH = 4
GPU_FLOPS = 990e12 * 0.3
"""An H100's dense bfloat16 peak, of which 30 % are used."""
LORA_RANK = 16


def row(name: str, preset: str, lora_rank: int = 0) -> list[str]:
    """One line of the table."""
    shapes = Shapes.of_config(MODELS[name])
    advice = recommendation("npo", shapes.parameters)
    copies, rounds = int(PRESETS[preset]["copies"]), int(PRESETS[preset].get("rounds", 5))
    options = advice.options(rounds)
    training = Training("npo", epochs=options["epochs"], learning_rate=options["learning_rate"], lora_rank=lora_rank)
    memory = shapes.training_bytes(
        training,
        examples=MICRO_BATCH,
        tokens=TOKENS,
        answer_tokens=ANSWER_TOKENS,
        precision="bfloat16",
        checkpointing=True,
    )
    copy, update = shapes.copy_bytes(), shapes.update_bytes(training)
    disk = network_disk(shapes, training, copies=copies, rounds=rounds, copy=copy, clients=1, references=False)
    examples = 2 * EXAMPLES * training.epochs * rounds * copies
    flops = 4 * shapes.forward_flops(examples * TOKENS, examples * ANSWER_TOKENS)
    return [
        f"{name}, {preset}" + (f", LoRA {lora_rank}" if lora_rank else ""),
        f"{rounds} × {copies} × {training.epochs}",
        f"{training.learning_rate:g}",
        f"{memory.total / 1e9:.0f}",
        f"{disk.server / 1e9:.0f} / {disk.client / 1e9:.0f}",
        f"{copies * copy / 1e9:.1f} / {copies * update / 1e9:.1f}",
        f"{flops / GPU_FLOPS / 60:.1f}",
    ]


def table() -> str:
    """The table, in Markdown."""
    header = [
        "model and preset",
        "rounds × copies × epochs",
        "learning rate",
        "GPU memory, GB",
        "disk, server / client, GB",
        "a round's traffic, down / up, GB",
        "GPU minutes, computing only",
    ]
    cases = [(name, preset) for name in ("llama-3.2-1b", "llama-2-7b") for preset in ("hardened", "lean")]
    rows = [row(*case) for case in cases] + [row("llama-2-7b", "hardened", LORA_RANK)]
    return markdown(header, rows)


if __name__ == "__main__":
    print(table())
