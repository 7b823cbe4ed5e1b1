"""What MPU costs the client beside what it must cost: m trainings.

In one process, on one model that is trained in a few seconds: a hand-written training loop of twenty lines, `unlearn` on an
ordinary checkpoint, and a whole MPU round (`preprocess`, m copies unlearned by one `Client`, `postprocess`). Goals: `unlearn`
takes at most 1.1 times as long as the hand-written loop, and the round at most 1.1 · m times as long as `unlearn`. Also
printed: how much smaller the exchange becomes with LoRA, measured here and for the shapes of a real model.

    python benchmarks/overhead.py [--copies 3] [--repeats 5] [--lora-rank 16]
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpunlearn import Client, Perturbation, Training, postprocess, preprocess, unlearn
from mpunlearn.checkpoint import Checkpoint, TensorDirectory, TensorWriter
from mpunlearn.client.batches import batches
from mpunlearn.client.objectives import nll
from mpunlearn.client.weights import LAYER, select
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.files import new_directory
from mpunlearn.lm.examples import IGNORED, collate, encode
from mpunlearn.lm.model import load
from mpunlearn.lm.records import read_records

RECIPE = Recipe(hidden=320, layers=6, heads=8, groups=4, ffn=864)
QWEN = {"layers": 24, "hidden": 896, "ffn": 4864, "key_value": 128}
"""Shapes of Qwen2.5 0.5B."""


def hand_written(model_path: Path, forget: Path, retain: Path, out: Path, training: Training) -> None:
    """GradDiff as one would write it for one model: AdamW on the layers' weights."""
    model, tokenizer = load(model_path)
    select(model, "blocks")
    forget_set = encode(read_records(forget), tokenizer, training.max_length)
    retain_set = encode(read_records(retain), tokenizer, training.max_length)
    size, epochs = training.batch_size, training.epochs
    plan = batches(len(forget_set), len(retain_set), batch_size=size, epochs=epochs, seed=0, round_number=1)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=training.learning_rate, weight_decay=0.0)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        return nll(logits, targets).sum() / (targets != IGNORED).sum()

    model.train()
    for picks in plan:
        forgotten = collate([forget_set[pick.forget] for pick in picks], 2)
        kept = collate([retain_set[pick.retain or 0] for pick in picks], 2)
        optimizer.zero_grad()
        torch.autograd.backward(loss(kept) - loss(forgotten))
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
    """Seconds that a call takes."""
    begin = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - begin


def update_bytes(path: Path) -> int:
    """Bytes of an update's tensors."""
    return sum(info.nbytes for info in TensorDirectory(path, stem="update").tensors.values())


def qwen_ratio(rank: int) -> float:
    """How many times larger than its LoRA factors the update of Qwen2.5 0.5B's layers is."""
    hidden, ffn, key_value = QWEN["hidden"], QWEN["ffn"], QWEN["key_value"]
    matrices = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    matrices += [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
    dense = sum(rows * columns for rows, columns in matrices)
    return dense / sum(rank * (rows + columns) for rows, columns in matrices)


def main() -> None:
    """Measures, and prints a table and JSON."""
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
        layers = sum(p.numel() for name, p in model.named_parameters() if re.search(LAYER, name))
        models.save(model, tokenizer, root / "model")
        files = {}
        for split in ("forget", "retain"):
            files[split] = root / f"{split}.jsonl"
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")

        def mpu_round(number: int) -> None:
            place = root / f"round-{number}"
            published = preprocess(
                root / "model", state=place / "s", out=place / "c", perturbation=Perturbation(copies=copies)
            )
            client = Client(**files, training=training)
            updates = [client.unlearn(copy, place / "u" / copy.name) for copy in published.copies]
            postprocess(updates, state=place / "s", out=place / "o")

        for repeat in range(arguments.repeats + 1):
            plain = {**files, "training": training}
            found = {
                "hand-written loop": timed(hand_written, root / "model", out=root / f"hand-{repeat}", **plain),
                "unlearn": timed(unlearn, root / "model", out=root / f"plain-{repeat}", **plain),
                "MPU round": timed(mpu_round, repeat),
            }
            for name, value in found.items() if repeat else ():  # the first time everything is loaded and warmed
                seconds[name].append(value)
        lora = unlearn(
            root / "model",
            **files,
            out=root / "lora",
            training=Training(**{**training.__dict__, "lora_rank": rank}),
        )
        smaller = update_bytes(root / "plain-0") / update_bytes(lora)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "parameters": parameters,
        "trained": layers,
        "copies": copies,
        "seconds": middle,
        "unlearn / hand-written loop": middle["unlearn"] / middle["hand-written loop"],
        "MPU round / (m * unlearn)": middle["MPU round"] / (copies * middle["unlearn"]),
        "lora": {"rank": rank, "update smaller by": smaller, "qwen2.5-0.5b smaller by": qwen_ratio(rank)},
    }
    print(json.dumps(result, indent=2))
    print("\n| | seconds (median) | ratio | goal |\n|---|---|---|---|")
    print(f"| hand-written loop | {middle['hand-written loop']:.2f} | | |")
    ratio = result["unlearn / hand-written loop"]
    print(f"| `unlearn` | {middle['unlearn']:.2f} | {ratio:.2f} x the loop | 1.1 |")
    ratio = result["MPU round / (m * unlearn)"]
    print(f"| MPU round, {copies} copies | {middle['MPU round']:.2f} | {ratio:.2f} x {copies} `unlearn` | 1.1 |")
    print(
        f"\nLoRA of rank {rank}: the update is {smaller:.1f} x smaller here, {qwen_ratio(rank):.1f} x for Qwen2.5 0.5B"
    )


if __name__ == "__main__":
    main()
