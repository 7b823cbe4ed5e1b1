"""Measures the overhead of MPU on top of the m training runs that the method requires.

Times three things in one process, on a model that trains in a few seconds: a minimal hand-written training loop,
`unlearn` on an ordinary checkpoint, and a complete MPU round (`preprocess`, one `Client` that unlearns m copies,
`postprocess`). The goals are that `unlearn` takes at most 1.1 times as long as the hand-written loop, and the round at
most 1.1 · m times as long as `unlearn`. Also prints how much smaller an update is with LoRA, for this model and for the
shapes of Qwen2.5 0.5B.

    python benchmarks/overhead.py [--copies 3] [--repeats 5] [--lora-rank 16]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpunlearn import Client, Perturbation, Training, postprocess, preprocess, unlearn
from mpunlearn.checkpoint import Checkpoint, TensorDirectory, TensorWriter
from mpunlearn.client.batches import optimizer_steps
from mpunlearn.client.objectives import nll
from mpunlearn.client.weights import select
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.files import new_directory
from mpunlearn.lm.examples import IGNORED, collate, encode
from mpunlearn.lm.model import load
from mpunlearn.lm.records import read_records
from mpunlearn.tables import markdown

RECIPE = Recipe(hidden=320, layers=6, heads=8, groups=4, ffn=864)
QWEN = {"layers": 24, "hidden": 896, "ffn": 4864, "key_value": 128}
"""Shapes of Qwen2.5 0.5B."""


def hand_written(model_path: Path, forget: Path, retain: Path, out: Path, training: Training) -> None:
    """A minimal implementation of GradDiff: AdamW on the weights of the transformer layers."""
    model, tokenizer = load(model_path)
    select(model, "blocks")
    forget_set = encode(read_records(forget), tokenizer, training.max_length)
    retain_set = encode(read_records(retain), tokenizer, training.max_length)
    size, epochs = training.batch_size, training.epochs
    steps = optimizer_steps(len(forget_set), len(retain_set), batch_size=size, epochs=epochs, seed=0, round_number=1)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=training.learning_rate, weight_decay=0.0)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        return nll(logits, targets).sum() / (targets != IGNORED).sum()

    model.train()
    for picks in steps:
        forget_batch = collate([forget_set[pick.forget] for pick in picks], 2)
        retain_batch = collate([retain_set[pick.retain or 0] for pick in picks], 2)
        optimizer.zero_grad()
        torch.autograd.backward(loss(retain_batch) - loss(forget_batch))
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    source = Checkpoint(model_path)
    with (
        new_directory(out) as folder,
        TensorWriter(folder, {name: (torch.float32, tuple(p.shape)) for name, p in trained.items()}) as writer,
    ):
        for name, parameter in trained.items():
            writer.write(name, parameter.detach() - source.read(name))


def timed(work: Callable[..., object], *arguments: Any, **options: Any) -> float:
    """The duration of a call, in seconds."""
    begin = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - begin


def update_bytes(path: Path) -> int:
    """The size of an update's tensors, in bytes."""
    return sum(info.nbytes for info in TensorDirectory(path, stem="update").tensors.values())


def qwen_ratio(rank: int) -> float:
    """Size of a dense update of the layers of Qwen2.5 0.5B, relative to its LoRA factors."""
    hidden, ffn, key_value = QWEN["hidden"], QWEN["ffn"], QWEN["key_value"]
    matrices = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    matrices += [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
    dense = sum(rows * columns for rows, columns in matrices)
    return dense / sum(rank * (rows + columns) for rows, columns in matrices)


def main() -> None:
    """Runs the measurements, and prints JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lora-rank", type=int, default=16)
    arguments = parser.parse_args()
    copies, rank = arguments.copies, arguments.lora_rank
    rows = generate_rows(0, Recipe())
    tokenizer = models.tokenizer_of(rows, Recipe())
    training = Training(objective="grad-diff", epochs=4, batch_size=8, learning_rate=1e-4)
    seconds: dict[str, list[float]] = {"hand-written loop": [], "unlearn": [], "MPU round": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        torch.manual_seed(0)
        model = models.new_llama(tokenizer, RECIPE)
        parameters = sum(p.numel() for p in model.parameters())
        selected = select(model, "blocks")
        trained = sum(p.numel() for name, p in model.named_parameters() if name in selected)
        models.save(model, tokenizer, root / "model")
        forget, retain = root / "forget.jsonl", root / "retain.jsonl"
        for file in (forget, retain):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows[file.stem]), encoding="utf-8")

        def plain(out: Path) -> Path:
            return unlearn(root / "model", forget=forget, retain=retain, out=out, training=training)

        def mpu_round(folder: Path) -> None:
            published = preprocess(
                root / "model",
                state=folder / "s",
                out=folder / "c",
                lineage=root / "lineage",
                perturbation=Perturbation(copies=copies),
            )
            client = Client(forget=forget, retain=retain, training=training)
            updates = [client.unlearn(copy, folder / "u" / copy.name) for copy in published.copies]
            postprocess(updates, state=folder / "s", out=folder / "o")

        for repeat in range(arguments.repeats + 1):
            measured = {
                "hand-written loop": timed(
                    hand_written, root / "model", forget, retain, root / f"hand-{repeat}", training
                ),
                "unlearn": timed(plain, root / f"plain-{repeat}"),
                "MPU round": timed(mpu_round, root / f"round-{repeat}"),
            }
            for name, value in measured.items() if repeat else ():  # the first repeat is for warm-up
                seconds[name].append(value)
        lora = unlearn(
            root / "model",
            forget=forget,
            retain=retain,
            out=root / "lora",
            training=replace(training, lora_rank=rank),
        )
        smaller = update_bytes(root / "plain-0") / update_bytes(lora)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "parameters": parameters,
        "trained": trained,
        "copies": copies,
        "seconds": middle,
        "unlearn / hand-written loop": middle["unlearn"] / middle["hand-written loop"],
        "MPU round / (m * unlearn)": middle["MPU round"] / (copies * middle["unlearn"]),
        "lora": {"rank": rank, "update smaller by": smaller, "qwen2.5-0.5b smaller by": qwen_ratio(rank)},
    }
    print(json.dumps(result, indent=2))
    ratios = (result["unlearn / hand-written loop"], result["MPU round / (m * unlearn)"])
    lines = [
        ["hand-written loop", f"{middle['hand-written loop']:.2f}", "", ""],
        ["`unlearn`", f"{middle['unlearn']:.2f}", f"{ratios[0]:.2f} x the loop", "1.1"],
        [f"MPU round, {copies} copies", f"{middle['MPU round']:.2f}", f"{ratios[1]:.2f} x {copies} `unlearn`", "1.1"],
    ]
    print("\n" + markdown(["", "seconds (median)", "ratio", "goal"], lines))
    print(f"\nLoRA, rank {rank}: updates are {smaller:.1f} x smaller here, {qwen_ratio(rank):.1f} x for Qwen2.5 0.5B")


if __name__ == "__main__":
    main()
