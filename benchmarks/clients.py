"""Measures what the number of clients costs the server: seconds, memory and disk per round, with some clients lost.

The server's coordinator runs in this process. All clients run in another one: real workers with keys and folders of their
own, which train the built-in benchmark's model for one epoch on four texts, one after the other. A fifth of them connect and
never answer. The first round ends with its deadline and a quorum, and they are dropped; the second round is measured, from its
publication to the end. Flower is left out: messages are handed over as its courier would.

    python benchmarks/clients.py [--clients 5,10,20]

*Server, seconds* is the processor time that the coordinator takes, *wall* what the whole round takes, and *held* what the
server's folder takes at the most, in either round.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mpunlearn import Perturbation, Training
from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.worker import Worker
from mpunlearn.demo.models import trained_world
from mpunlearn.protocol.flower.courier.mail import Mail
from mpunlearn.protocol.flower.courier.spool import exchange
from mpunlearn.protocol.messages import Job, Sealed
from mpunlearn.server.federation import Federation
from mpunlearn.server.network.coordinator import Coordinator
from mpunlearn.server.plan import RunPlan, Service
from mpunlearn.tables import markdown

COPIES, ROUNDS = 2, 2
TEXTS = 4
LOST = 5
"""One client in this many never answers."""
SECONDS_PER_CLIENT = 12.0
"""Deadline of a round, for each client: they train one after the other."""
LOOK_SECONDS = 2.0
TRAINING = Training(objective="npo", epochs=1, batch_size=4, learning_rate=1e-3, max_length=64)


def clients(folder: Path, count: int, server_key: str, mail_folder: Path, nodes: Path) -> None:
    """Runs all clients of a run, until this process is ended."""
    policy = Policy(server_key, plan=PlanBounds(min_steps=1))
    workers = [
        Worker(
            folder / f"spool-{number}",
            folder / f"work-{number}",
            policy,
            forget=folder / "forget.jsonl",
            retain=folder / "retain.jsonl",
            say=lambda text: None,
        )
        for number in range(count)
    ]
    mail = Mail(mail_folder)
    while True:
        for number, worker in enumerate(workers):
            node, spool = str(number + 1), folder / f"spool-{number}"
            (nodes / node).touch()
            record: Any = mail.load(node)
            is_lost = number % LOST == LOST - 1
            if record is None or (is_lost and any(isinstance(Sealed.open(job).message, Job) for job in record["jobs"])):
                continue
            deliver = dict(zip(record["names"], record["jobs"], strict=True))
            results, missing = exchange(spool, deliver, record["wanted"], 0.0)
            mail.unload(node, {"names": list(results), "results": list(results.values()), "missing": missing})
            worker.step()
        time.sleep(0.05)


def measure(count: int) -> dict[str, Any]:
    """One run with so many clients."""
    with tempfile.TemporaryDirectory() as name:
        folder, world = Path(name), trained_world(0)
        for split in ("forget", "retain"):
            lines = world.data(split).read_text(encoding="utf-8").splitlines(keepends=True)[:TEXTS]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        lost = count // LOST
        federation = Federation(clients=count, quorum=count - lost, deadline=SECONDS_PER_CLIENT * count)
        plan = RunPlan(
            str(world.original),
            lineage=str(folder / "lineage"),
            rounds=ROUNDS,
            perturbation=Perturbation(copies=COPIES),
            training=TRAINING,
            service=Service("127.0.0.1", 9100, "127.0.0.1", federation=federation),
        )
        said: list[str] = []
        coordinator = Coordinator(plan, folder / "server", said.append, None)
        arguments = (folder, count, coordinator.identity.public, coordinator.folder.mail, coordinator.folder.nodes)
        others = multiprocessing.get_context("spawn").Process(target=clients, args=arguments)
        others.start()
        begin = used = looked = held = 0.0
        done = False
        try:
            while not done:
                before = time.process_time()
                done = coordinator.step()
                used += time.process_time() - before
                if not begin and any(text.startswith("round 2:") for text in said):
                    begin, used = time.monotonic(), 0.0
                if time.monotonic() - looked > LOOK_SECONDS:
                    held, looked = max(held, size(folder / "server")), time.monotonic()
                time.sleep(0.1)
        finally:
            others.terminate()
            others.join()
        return {
            "clients": count,
            "lost": lost,
            "server, seconds": f"{used:.1f}",
            "wall, seconds": f"{time.monotonic() - begin:.0f}",
            "peak memory, GB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f}",
            "held, MB": f"{held / 1e6:.0f}",
        }


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def main() -> None:
    """Measures each number of clients in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="5,10,20")
    numbers = [int(number) for number in parser.parse_args().clients.split(",")]
    rows = []
    for number in numbers:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, number).result())
        print(rows[-1], flush=True)
    print(markdown(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
