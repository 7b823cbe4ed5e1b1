"""A federation in one process: the coordinator, workers, and the courier's own two ends, without Flower between them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.conftest import tiny_model
from tests.perturbations import without_offset

from mpunlearn import Training
from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.worker import Worker
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.protocol.flower.courier.mail import Mail
from mpunlearn.protocol.flower.courier.spool import exchange
from mpunlearn.protocol.flower.keys import ClientKeys
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.transfer import Store
from mpunlearn.server.federation import Federation
from mpunlearn.server.network.coordinator import Coordinator
from mpunlearn.server.plan import RunPlan, Service

NODE_KEY = "ecdsa-sha2-nistp384 " + "A" * 64
TRAINING = Training(objective="simnpo", epochs=1, batch_size=4, learning_rate=1e-3)


def tiny_world(folder: Path) -> tuple[Path, Path]:
    """A tiny random model in FOLDER/model, a forget file and a retain file."""
    recipe = Recipe()
    rows = generate_rows(0, recipe)
    tokenizer = models.tokenizer_of(rows, recipe)
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 2}
    tiny_model("llama", torch.float32, **sizes).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    files = (folder / "forget.jsonl", folder / "retain.jsonl")
    for file, split in zip(files, ("forget", "retain"), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[split][:4]), encoding="utf-8")
    return files


@dataclass
class Net:
    """Everything of one run, each party in a folder of its own."""

    folder: Path
    model: Path
    forget: list[Path]
    retain: Path
    federation: Federation = field(default_factory=Federation)
    rounds: int = 2
    copies: int = 2
    training: Training = TRAINING
    perturbation: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    decoys: Path | None = None
    silent: set[int] = field(default_factory=set)
    """Numbers of clients that connect and then do nothing."""
    said: list[str] = field(default_factory=list)
    tamper: Callable[[str, str, bytes], bytes | None] | None = None
    """(node, name, result) → what arrives instead; None: nothing."""

    def __post_init__(self) -> None:
        self.start_server()
        self.workers = [self.start_worker(number) for number in range(len(self.forget))]

    @property
    def final(self) -> Path:
        return self.folder / "server" / "final"

    def spool(self, number: int) -> Path:
        return self.folder / f"spool-{number}"

    def plan(self, trusted: list[str] | None = None) -> RunPlan:
        """The run's plan."""
        clients = [ClientKeys(key, NODE_KEY) for key in trusted or []]
        return RunPlan(
            checkpoint=str(self.model),
            rounds=self.rounds,
            perturbation=without_offset(**{"copies": self.copies, "kappa": 0.02, **self.perturbation}),
            training=self.training,
            service=Service("127.0.0.1", 9100, "127.0.0.1", None, clients, self.federation),
        )

    def start_server(self, trusted: list[str] | None = None) -> None:
        """Starts the coordinator, or starts it again."""
        plan, server = self.plan(trusted), self.folder / "server"
        self.store = Store(self.federation.store, self.federation.deadline + 86400) if self.federation.store else None
        self.coordinator = Coordinator(plan, server, self.said.append, self.store)
        self.mail = Mail(self.coordinator.folder.mail)

    def start_worker(self, number: int) -> Worker:
        """Starts a worker, or starts it again."""
        policy = Policy(self.coordinator.identity.public, **{"plan": PlanBounds(min_steps=1), **self.policy})
        folder = self.folder / f"work-{number}"
        return Worker(
            self.spool(number),
            folder,
            policy,
            forget=self.forget[number],
            retain=self.retain,
            decoys=self.decoys,
            say=self.said.append,
        )

    def identity(self, number: int) -> Identity:
        return Identity.at(self.folder / f"work-{number}" / "identity.key")

    def carry(self) -> None:
        """What Flower does: to every node and back."""
        for number in range(len(self.workers)):
            node = str(number + 1)
            (self.coordinator.folder.nodes / node).touch()
            record = self.mail.load(node)
            if record is None:
                continue
            deliver = dict(zip(record["names"], record["jobs"], strict=True))
            results, missing = exchange(self.spool(number), deliver, record["wanted"], 0.0)
            if self.tamper is not None:
                changed = {name: self.tamper(node, name, data) for name, data in results.items()}
                results = {name: data for name, data in changed.items() if data is not None}
            self.mail.unload(node, {"names": list(results), "results": list(results.values()), "missing": missing})

    def turn(self) -> bool:
        """Everybody does what can be done now."""
        done = self.coordinator.step()
        self.carry()
        for number, worker in enumerate(self.workers):
            if number not in self.silent or self.identity(number).public not in self.coordinator.roster.clients:
                worker.step()
        self.carry()
        return done

    def run(self, turns: int = 60) -> Path:
        """Turns until the run is complete."""
        for _ in range(turns):
            if self.turn():
                return self.final
        raise AssertionError(f"not complete after {turns} turns: {self.said}")


def net_of(folder: Path, world: tuple[Path, Path, Path], clients: int = 1, **options: Any) -> Net:
    federation = Federation(**{"clients": clients, **options.pop("federation", {})})
    return Net(folder, world[0], [world[1]] * clients, world[2], federation, **options)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def begun(folder: Path, world: tuple[Path, Path, Path], **options: Any) -> Path:
    """A run whose secret exists, to be copied: copies of it must end with the same bytes."""
    net = net_of(folder, world, **options)
    net.coordinator.step()
    return folder


def until(net: Net, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if net.turn():
            return
    raise AssertionError(net.said)
