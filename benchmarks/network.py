"""Measures the cost of a round over the network without training: bytes, seconds, and peak memory of every process.

Server, client and Flower run as in production, but on the loopback address, and the client writes an update with the
right shapes instead of training. The cases are: weights inside the messages or in a shared store (a folder), and dense
updates or LoRA factors of rank 16. *Transfer* is the time spent uploading and downloading files, including digests and
syncs. It is compared with plain file copies separately, in alternating trials.

    python benchmarks/network.py [--models tiny,qwen2.5-0.5b] [--copies 3] [--out DIR]
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from mpunlearn.checkpoint import Checkpoint, TensorWriter
from mpunlearn.files import new_directory, write_json
from mpunlearn.protocol.exchange import CARD
from mpunlearn.protocol.flower.programs import free_port
from mpunlearn.protocol.plan import Training
from mpunlearn.server.updates import planned_tensors
from mpunlearn.tables import markdown
from shapes import MODELS, build, size, synthetic_update

RANK = 16
ROUNDS = 2
TRIALS = 5


def factors(copy: Path, out: Path, training: Training) -> Path:
    """Writes an update of random LoRA factors for every matrix that the plan adapts."""
    source = Checkpoint(copy)
    planned = planned_tensors(copy, training)
    specs = {}
    for name, info in source.tensors.items():
        if planned is not None and name in planned:
            specs[f"{name}.lora_A"] = (torch.float32, (RANK, info.shape[1]))
            specs[f"{name}.lora_B"] = (torch.float32, (info.shape[0], RANK))
    with new_directory(out) as folder:
        write_json(folder / "update.json", {CARD: source.config[CARD]})
        with TensorWriter(folder, specs, stem="update") as writer:
            for name, (_, shape) in specs.items():
                writer.write(name, torch.randn(shape) * 1e-5)
    return out


def party(name: str, report: Path, arguments: list[str]) -> None:
    """Runs one party in its own process, with timed transfers, and without examining copies or training on them."""
    from mpunlearn.cli import main as cli
    from mpunlearn.client.client import Client
    from mpunlearn.client.network import worker
    from mpunlearn.client.network.handling import Handling
    from mpunlearn.protocol import transfer
    from mpunlearn.server.network import publication, results

    spent = {"seconds": 0.0, "arrived": 0.0}

    def timed(function: Callable[..., Any], arriving: Callable[..., int] = lambda *_: 0) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            begin = time.perf_counter()
            result = function(*given)
            spent["seconds"] += time.perf_counter() - begin
            spent["arrived"] += arriving(*given)
            return result

        return call

    Store = transfer.Store
    Store.put = timed(Store.put)  # type: ignore[method-assign]
    Store.fetch = timed(Store.fetch, lambda _, key, file, target: file.size)  # type: ignore[method-assign]
    put, file_entry = timed(transfer.put), timed(transfer.file_entry)
    receive = timed(transfer.receive, lambda file, payload, target: file.size)
    worker.put, worker.file_entry, worker.receive = put, file_entry, receive  # type: ignore[attr-defined]
    publication.file_entry, results.receive = file_entry, receive  # type: ignore[attr-defined]
    training: list[int] = []

    def unlearn(client: Client, copy: Path, out: Path) -> Path:
        training.append(client.training.lora_rank)
        return factors(copy, out, client.training) if client.training.lora_rank else synthetic_update(copy, out)

    Client.unlearn = unlearn  # type: ignore[assignment,method-assign]
    Handling.examine = lambda *_: None  # type: ignore[method-assign]
    code = cli(arguments)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e6
    report.write_text(json.dumps({**spent, "peak_gb": peak}))
    sys.exit(code)


def watch(folder: Path, peaks: dict[str, float], stop: threading.Event) -> None:
    """Records the peak resident memory, in GB, of Flower's programs until `stop` is set."""
    homes = {str(folder / "run" / "flower"), str(folder / "work" / "flower")}
    while not stop.wait(0.3):
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") in homes:
                    name = next(Path(part).name for part in process.cmdline() if "fl" in Path(part).name)
                    peaks[name] = max(peaks.get(name, 0.0), process.memory_info().rss / 1e9)
            except (psutil.Error, StopIteration):
                continue


def against_copying(folder: Path) -> float:
    """Time to send a file through a store, relative to copying it twice; the median of alternating trials.

    No files are removed between the trials, since recently freed page cache would make the next step look faster.
    """
    from mpunlearn.protocol.transfer import Store, fetch

    source, store = folder / "source", Store(str(folder / "store"))
    source.write_bytes(os.urandom(1 << 20) * 1000)

    def transferred(trial: int) -> None:
        sent = store.put(source, str(trial))
        fetch(str(sent.url), sent, folder / f"fetched-{trial}")

    def copied(trial: int) -> None:
        for number in range(2):
            shutil.copyfile(source, folder / f"copied-{trial}-{number}")
            with (folder / f"copied-{trial}-{number}").open("rb") as file:
                os.fsync(file.fileno())

    def seconds(action: Callable[[int], None], trial: int) -> float:
        begin = time.perf_counter()
        action(trial)
        return time.perf_counter() - begin

    return statistics.median(seconds(transferred, trial) / seconds(copied, trial) for trial in range(TRIALS))


def case(folder: Path, model: Path, copies: int, store: bool, lora: bool) -> dict[str, Any]:
    """Runs two rounds; returns the cost per round."""
    folder.mkdir()
    (folder / "forget.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    server = ["server", "start", str(model), "--run", "run", "--insecure", "--port", str(free_port())]
    server += ["--rounds", str(ROUNDS), "--copies", str(copies), "--objective", "grad-ascent"]
    server += ["--lora-rank", str(RANK)] if lora else ["--train", "all"]
    server += ["--store", "store"] if store else []
    client = ["client", "join", "run/invitation.json", "--work", "work", "--forget", "forget.jsonl"]
    client += ["--policy", "policy.toml"]
    peaks: dict[str, float] = {}
    stop = threading.Event()
    threading.Thread(target=watch, args=(folder, peaks, stop), daemon=True).start()

    def start(name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--party", name, f"{name}.json", *arguments]
        with (folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    programs = [start("server", server)]
    invitation = folder / "run" / "invitation.json"
    while not invitation.exists() and programs[0].poll() is None:
        time.sleep(0.1)
    key = json.loads(invitation.read_text())["server_key"]
    stores = json.dumps([(folder / "store").as_uri()])
    (folder / "policy.toml").write_text(
        f'server_key = "{key}"\ntrain = ["all", "blocks"]\nstores = {stores}\n[plan]\nmin_steps = 0\n'
    )
    begin = time.perf_counter()
    programs.append(start("client", client))
    codes = [program.wait() for program in reversed(programs)]
    seconds = time.perf_counter() - begin
    stop.set()
    if any(codes):
        raise SystemExit((folder / "server.log").read_text() + (folder / "client.log").read_text())
    at_server, at_client = (json.loads((folder / f"{name}.json").read_text()) for name in ("server", "client"))
    peaks |= {"server": at_server["peak_gb"], "worker": at_client["peak_gb"]}
    return {
        "seconds": seconds / ROUNDS,
        "crossed_mb": (at_server["arrived"] + at_client["arrived"]) / ROUNDS / 1e6,
        "transfer_seconds": (at_server["seconds"] + at_client["seconds"]) / ROUNDS,
        "peaks": peaks,
    }


def cells(result: dict[str, Any]) -> list[str]:
    """The numbers of a case, formatted for the table."""
    largest = max(result["peaks"], key=lambda name: result["peaks"][name])
    return [
        f"{result['crossed_mb']:.1f}",
        f"{result['seconds']:.1f}",
        f"{result['transfer_seconds']:.2f} s",
        f"{largest} {result['peaks'][largest]:.2f} GB",
    ]


def main() -> None:
    """Runs all cases and the comparison with copying, and prints JSON and a table."""
    if len(sys.argv) > 3 and sys.argv[1] == "--party":
        return party(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,qwen2.5-0.5b")
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for models, 12 x the size of the largest (default: temporary)")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models.split(",") if arguments.models else []:
        with tempfile.TemporaryDirectory(dir=arguments.out) as temporary:
            root = Path(temporary)
            model = build(root / "model", MODELS[name])
            inline = size(model) < 60_000_000
            for store, lora in [(False, False), (False, True), (True, False), (True, True)][0 if inline else 2 :]:
                result = case(root / f"{store}-{lora}", model, arguments.copies, store, lora)
                shutil.rmtree(root / f"{store}-{lora}")
                print(json.dumps({"shapes": name, "store": store, "lora": lora, **result}), flush=True)
                rows.append(
                    [name, "by reference" if store else "in the message", "LoRA" if lora else "dense", *cells(result)]
                )
    print(
        "\n"
        + markdown(
            ["shapes", "weights", "update", "MB per round", "seconds per round", "transfer", "largest process"], rows
        )
    )
    with tempfile.TemporaryDirectory(dir=arguments.out) as temporary:
        print(
            f"\nuploading and downloading takes {against_copying(Path(temporary)):.1f} times as long as copying twice"
        )


if __name__ == "__main__":
    main()
