"""Training on several processes: memory of each against their number, and the same update as one process gives.

Builds a random Llama of 208 M parameters, unlearns eight examples in two optimizer steps (AdamW, float32) on 1, 2 and 4
processes that talk over gloo, and measures for each process the peak memory while it loads, trains and writes, above what
it had before, and the bytes that it receives. Then trains on 4 processes, kills one with signal 9 in the middle of the
second checkpoint, and goes on with 2. Prints the measured numbers beside those that `mpunlearn plan` computes, and the
distance of every update to that of one process.

`--table` only prints what larger models need, computed from their shapes; nothing is run. Training is NPO with AdamW in
bfloat16 with gradient checkpointing, 32 examples in a step, four or fewer in a micro-batch, and texts of TOFU's length (see
recipes.py). Each row has the least number of processes, a power of two, that fits into GPUs of 80 GB with a tenth to spare;
with offloading also into 250 GB of the host for each of them.

    python benchmarks/sharded.py [--table]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpunlearn.checkpoint import TensorDirectory
from mpunlearn.planning.report import SeveralProcesses
from mpunlearn.planning.sharded import several_processes
from mpunlearn.planning.sizes import Shapes
from mpunlearn.protocol.plan import Training
from mpunlearn.tables import markdown
from shapes import MODELS, build

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 26400, "tie_word_embeddings": False,
    "max_position_embeddings": 512, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TRAINING = Training("npo", epochs=1, batch_size=4, learning_rate=1e-4, max_length=64)
EXAMPLES = 8
GPU_BYTES, HOST_BYTES = 72e9, 250e9
TOFU: dict[str, Any] = {"tokens": 80, "answer_tokens": 60, "precision": "bfloat16", "checkpointing": True}
BATCH = 32
CASES: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("llama-2-7b", {}, False),
    ("llama-2-7b", {"lora_rank": 16}, False),
    ("llama-3.1-70b", {}, False),
    ("llama-3.1-70b", {}, True),
    ("llama-3.1-70b", {"lora_rank": 16}, False),
    ("llama-3.1-405b", {}, False),
    ("llama-3.1-405b", {}, True),
    ("llama-3.1-405b", {"lora_rank": 16}, False),
)


def computed(
    shapes: Shapes, training: Training, count: int, offload: bool, batch: int, **sizes: Any
) -> SeveralProcesses:
    """What `plan` computes for a number of processes."""
    return several_processes(
        shapes,
        training,
        shapes.training_bytes(training, **sizes),
        processes=count,
        micro_batches=max(1, batch // (count * sizes["examples"])),
        precision=sizes.get("precision", "float32"),
        cpu_offload=offload,
    )


def table() -> str:
    """What large models need, in Markdown."""
    rows = []
    for name, options, offload in CASES:
        shapes, training = Shapes.of_config(MODELS[name]), Training("npo", **options)
        for count in (2**power for power in range(offload, 11)):
            needs = computed(shapes, training, count, offload, BATCH, examples=min(4, -(-BATCH // count)), **TOFU)
            if needs.gpu <= GPU_BYTES and needs.host <= HOST_BYTES:
                break
        kind = f"LoRA {training.lora_rank}" if training.lora_rank else "all layers"
        rows.append(
            [
                name,
                kind + (", offloaded" if offload else ""),
                f"{count}",
                f"{needs.shard / 1e9:.0f}",
                f"{needs.gpu / 1e9:.0f}",
                f"{needs.host / 1e9:.0f}",
                f"{needs.step_traffic / 1e9:.0f}",
            ]
        )
    head = ["model", "trained", "processes", "shard, GB", "GPU, GB", "host, GB", "received in a step, GB"]
    return markdown(head, rows)


class Meter:
    """Peak memory of this process in each phase, above what it had when the first one began."""

    def __init__(self) -> None:
        self.base = 0
        self.peaks: dict[str, int] = {}

    def phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured."""

        def measured(*args: Any, **options: Any) -> Any:
            if not self.peaks:
                self.base = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            result = function(*args, **options)
            self.peaks[name] = _status("VmHWM") - self.base
            return result

        return measured


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def work(out: Path, save_every: int, kill: int) -> None:
    """One of the processes: unlearns, and writes what it measured next to the update."""
    import torch
    from torch import distributed
    from torch.distributed.checkpoint import state_dict_saver

    from mpunlearn import Resources, unlearn
    from mpunlearn.client import client as client_module
    from mpunlearn.client.trainer import Trainer

    torch.set_num_threads(1)
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    meter, received, in_steps, saves = Meter(), [0], [0], [0]

    def counting(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
        def counted(output: Any, *args: Any, **options: Any) -> Any:
            received[0] += int(output.nbytes * factor)
            return function(output, *args, **options)

        return counted

    def killed(*args: Any, **options: Any) -> Any:
        saves[0] += 1
        if saves[0] == kill and rank == count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*args, **options)

    def step(trainer: Trainer) -> None:
        before = received[0]
        original(trainer)
        in_steps[0] += received[0] - before

    for name, factor in (("all_gather_single", (count - 1) / count), ("reduce_scatter_single", count - 1)):
        setattr(distributed, name, counting(getattr(distributed, name), factor))
    save = state_dict_saver.save
    state_dict_saver.save = killed
    original = Trainer._step
    client_module.Client._model = meter.phase("load", client_module.Client._model)  # type: ignore[method-assign]
    Trainer.train = meter.phase("train", Trainer.train)  # type: ignore[method-assign]
    Trainer._step = step  # type: ignore[assignment, method-assign]
    writing = meter.phase("write", client_module.write_update)  # type: ignore[attr-defined]
    client_module.write_update = writing  # type: ignore[attr-defined]
    folder = out.parent
    unlearn(
        folder / "model",
        forget=folder / "forget.jsonl",
        retain=folder / "retain.jsonl",
        out=out,
        training=TRAINING,
        resources=Resources(micro_batch_size=1, save_every=save_every),
    )
    result = {**meter.peaks, "received": in_steps[0]}
    (folder / f"{out.name}-{rank}.json").write_text(json.dumps(result))


def prepare(folder: Path) -> None:
    """Writes the model and its data."""
    from mpunlearn.demo.models import tokenizer_of
    from mpunlearn.demo.world import Recipe, generate_rows

    build(folder / "model", CONFIG)
    rows = generate_rows(0, Recipe())
    tokenizer_of(rows, Recipe()).save_pretrained(folder / "model")
    for name in ("forget", "retain"):
        lines = [json.dumps(row) + "\n" for row in rows[name][:EXAMPLES]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def start(out: Path, count: int, save_every: int = 0, kill: int = 0) -> list[dict[str, int]]:
    """Runs `work` in several processes; what each of them measured, or nothing if one was killed."""
    command = [__file__, "--work", str(out), "--save-every", str(save_every), "--kill", str(kill)]
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    # What is freed goes back to the system at once, and is not counted.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, *runner, *command], env=environment, capture_output=True, text=True, check=False
    )
    if (done.returncode != 0) != bool(kill):
        raise SystemExit(done.stderr)
    files = sorted(out.parent.glob(f"{out.name}-*.json"))
    return [json.loads(file.read_text()) for file in files]


def distance(one: Path, other: Path) -> float:
    """Relative Frobenius distance of two updates."""
    left, right = (TensorDirectory(path, stem="update") for path in (one, other))
    assert set(left.tensors) == set(right.tensors)
    apart = norm = 0.0
    for name in left.tensors:
        value = left.read(name)
        apart += float((value - right.read(name)).square().sum())
        norm += float(value.square().sum())
    return float((apart / norm) ** 0.5)


def proof(folder: Path) -> str:
    """The measured table, in Markdown."""
    prepare(folder)
    shapes = Shapes.of_config(CONFIG)
    sizes = {"examples": 1, "tokens": 40, "answer_tokens": 20}
    largest = 4 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    rows = []
    for count in (1, 2, 4):
        measured = start(folder / f"u{count}", count)
        peaks = {name: max(process[name] for process in measured) for name in measured[0]}
        needs = computed(shapes, TRAINING, count, False, TRAINING.batch_size, **sizes)
        bound = 1.2 * 4 * shapes.parameters / count + largest
        steps = -(-EXAMPLES // TRAINING.batch_size)
        rows.append(
            [
                f"{count}",
                f"{peaks['load'] / 1e9:.2f} ≤ {bound / 1e9:.2f}",
                f"{peaks['train'] / 1e9:.2f} / {needs.gpu / 1e9:.2f}",
                f"{peaks['write'] / 1e9:.2f}",
                f"{peaks['received'] / steps / 1e9:.2f} / {needs.step_traffic / 1e9:.2f}",
                f"{distance(folder / 'u1', folder / f'u{count}'):.1e}",
            ]
        )
        print(rows[-1], flush=True)
    head = ["processes", "loading ≤ bound, GB", "training, measured / computed, GB", "writing, GB"]
    head += ["received in a step, measured / computed, GB", "distance to one process"]
    start(folder / "resumed", 4, save_every=1, kill=2)
    left = [item.name for item in (folder / ".resumed.training").glob("step-*")]
    start(folder / "resumed", 2, save_every=1)
    apart = distance(folder / "u1", folder / "resumed")
    resumed = (
        f"One of 4 processes killed in checkpoint 2; left: {', '.join(left)}; continued by 2; distance {apart:.1e}."
    )
    return f"{shapes.parameters / 1e6:.0f} M parameters.\n\n{markdown(head, rows)}\n\n{resumed}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--kill", type=int, default=0)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.save_every, options.kill)
        return
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            print(proof(Path(folder)))
    print(table())


if __name__ == "__main__":
    main()
