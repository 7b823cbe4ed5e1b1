"""Measures what updates tell the server, and what protecting them costs, on the built-in benchmark.

The client forgets half of the questions on four authors and retains 18 other authors. The remaining questions on the
four authors are texts on the same subjects, 14 more authors are known texts, and four more are decoys. Four tables:

- what the updates of one round tell, for several ways to train
- which weights name tokens, in a wider model: naming by row space needs more dimensions than tokens
- what can be spelled out of one step on four texts
- the probability of forget and retain answers after five rounds, for the same ways to train

    python benchmarks/client_audit.py [--seeds 5]
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpunlearn import Client, Perturbation, Training, preprocess, run
from mpunlearn.client.audit.audit import audit
from mpunlearn.client.audit.report import ClientAudit
from mpunlearn.demo import models
from mpunlearn.demo.models import TrainedWorld, trained_world
from mpunlearn.demo.table import measure_in
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import DisclosureWarning, NothingUnlearnedWarning
from mpunlearn.lm.records import Record
from mpunlearn.tables import markdown

PERTURBATION = Perturbation(copies=3, kappa=0.05, common_noise=0)
TRAINING = Training(objective="npo", epochs=2, learning_rate=1e-3, batch_size=8, gamma=0.1)
WIDE = Recipe(hidden=512, heads=8, groups=4, ffn=1024)
AUTHOR = 10
"""Questions per author."""
ARMS: dict[str, dict[str, Any]] = {
    "blocks (default)": {},
    "with token-local weights": {"token_local": True},
    "all weights": {"train": "all"},
    "LoRA, rank 16": {"lora_rank": 16, "learning_rate": 3e-3},
}
DECOYS = "blocks, with decoys"
SHOWN = {
    "leaks": ("floor-auc", "membership-auc", "membership-near-auc", "membership-decoy-auc", "retain-auc", "tokens-auc"),
    "spelling": ("spelling", "next-token-tpr", "tokens-auc", "membership-near-auc"),
}
"""The metrics in the tables."""
STEPS: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": "sgd", "learning_rate": 0.1},
    "TensorAdam": {"optimizer": "tensor_adam"},
    "AdamW, ε 1e-2": {"adam_epsilon": 1e-2},
    "AdamW": {},
    "AdamW, LoRA, rank 16": {"lora_rank": 16},
}


def write_texts(rows: Mapping[str, list[dict[str, Any]]], folder: Path) -> dict[str, Path]:
    """Writes the texts of each role; returns role → file."""
    forgotten, kept = rows["forget"], rows["retain"]
    parts = {
        "forget": forgotten[::2],
        "near": forgotten[1::2],
        "retain": kept[: 18 * AUTHOR],
        "reference": kept[18 * AUTHOR : 32 * AUTHOR],
        "decoys": kept[32 * AUTHOR :: 2],
    }
    folder.mkdir()
    for name, part in parts.items():
        lines = [json.dumps({key: row[key] for key in ("question", "answer")}) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in parts}


def one_round(model: Path, texts: Mapping[str, Path], training: Training, folder: Path, decoys: bool) -> ClientAudit:
    """Publishes the copies of a model, unlearns on each, and audits the updates."""
    copies = preprocess(model, state=folder / "state", out=folder / "copies", perturbation=PERTURBATION).copies
    hidden = texts["decoys"] if decoys else None
    client = Client(forget=texts["forget"], retain=texts["retain"], decoys=hidden, training=training)
    updates = [client.unlearn(copy, folder / "updates" / copy.name) for copy in copies]
    return audit(
        updates,
        copy=list(copies),
        forget=texts["forget"],
        retain=texts["retain"],
        reference=texts["reference"],
        near=texts["near"],
        decoys=hidden,
    )


def wide_model(seed: int, folder: Path) -> Path:
    """A wider model that was trained on all fictitious authors."""
    rows = generate_rows(seed, WIDE)
    tokenizer = models.tokenizer_of(rows, WIDE)
    torch.manual_seed(seed)
    model = models.new_llama(tokenizer, WIDE)
    records = [Record(row["question"], row["answer"]) for split in ("forget", "retain") for row in rows[split]]
    models.fit(model, tokenizer, records, 8, 16, 1.5e-3, seed, "training the wide model")
    models.save(model, tokenizer, folder)
    return folder


def leaks(world: TrainedWorld, texts: Mapping[str, Path], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Way to train → metrics of one round."""
    arms = {**{name: (options, False) for name, options in ARMS.items()}, DECOYS: ({}, True)}
    found = {}
    for name, (options, decoys) in arms.items():
        training = replace(TRAINING, seed=seed, **options)
        found[name] = one_round(world.original, texts, training, folder / f"leaks {name}", decoys).metrics()
    return only("leaks", found)


def naming(model: Path, texts: Mapping[str, Path], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Way to train → weights → AUC of naming tokens."""
    found = {}
    for name, options in ARMS.items():
        training = replace(TRAINING, seed=seed, **{"learning_rate": 3e-4, **options})
        report = one_round(model, texts, training, folder / f"naming {name}", False)
        found[name] = {label: leak.auc for label, leak in report.tokens.items()}
    return found


def spelling(world: TrainedWorld, texts: Mapping[str, Path], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Optimizer → metrics of one step on two texts to forget and two to retain."""
    few = dict(texts)
    for name in ("forget", "retain"):
        lines = texts[name].read_text(encoding="utf-8").splitlines(keepends=True)
        few[name] = texts[name].with_name(f"few-{name}.jsonl")
        few[name].write_text("".join(lines[:2]), encoding="utf-8")
    found = {}
    for name, options in STEPS.items():
        training = replace(TRAINING, epochs=1, seed=seed, **options)
        found[name] = one_round(world.original, few, training, folder / f"step {name}", False).metrics()
    return only("spelling", found)


def only(shown: str, found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Keeps the metrics that a table shows."""
    return {
        name: {metric: values[metric] for metric in SHOWN[shown] if metric in values} for name, values in found.items()
    }


def prices(world: TrainedWorld, texts: Mapping[str, Path], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Way to train → probability of the world's forget and retain answers after five rounds."""
    arms = {**{name: (options, None) for name, options in ARMS.items()}, DECOYS: ({}, texts["decoys"])}
    found = {}
    for name, (options, decoys) in arms.items():
        without = folder / "retain-without-decoys.jsonl"
        hidden = set(texts["decoys"].read_text(encoding="utf-8").splitlines()) if decoys else set()
        rows = [json.loads(line) for line in world.data("retain").read_text(encoding="utf-8").splitlines()]
        plain = [json.dumps({key: row[key] for key in ("question", "answer")}) for row in rows]
        without.write_text("".join(line + "\n" for line in plain if line not in hidden), encoding="utf-8")
        final = run(
            world.original,
            forget=world.data("forget"),
            retain=without,
            decoys=decoys,
            out=folder / f"run {name}",
            perturbation=PERTURBATION,
            training=replace(TRAINING, seed=seed, **options),
        )
        line = measure_in(world, name, final)
        found[name] = {"forget probability": line.forget.probability, "retain probability": line.retain.probability}
    return found


def table(first: str, seeds: list[dict[str, dict[str, float]]]) -> str:
    """Mean ± standard deviation over seeds; a value that a row lacks is left out."""
    columns = list(dict.fromkeys(column for rows in seeds for values in rows.values() for column in values))
    lines = []
    for name in seeds[0]:
        cells = []
        for column in columns:
            values = [rows[name][column] for rows in seeds if column in rows[name]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append([name, *cells])
    return markdown([first, *columns], lines)


def main() -> None:
    """Measures all tables and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    for category in (DisclosureWarning, NothingUnlearnedWarning):
        warnings.simplefilter("ignore", category)
    tables: dict[str, list[dict[str, dict[str, float]]]] = {
        "training": [],
        "wide model": [],
        "one step": [],
        "five rounds": [],
    }
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            folder, world = Path(name), trained_world(seed)
            texts = write_texts(generate_rows(seed, Recipe()), folder / "texts")
            tables["training"].append(leaks(world, texts, seed, folder))
            tables["wide model"].append(naming(wide_model(seed, folder / "wide"), texts, seed, folder))
            tables["one step"].append(spelling(world, texts, seed, folder))
            tables["five rounds"].append(prices(world, texts, seed, folder))
        for first, rows in tables.items():
            print(f"{table(first, rows)}\n", flush=True)


if __name__ == "__main__":
    main()
