"""A federation in one process: the coordinator, workers, and the courier's own two ends, without Flower between them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.conftest import tiny_model

from mpunlearn import Perturbation, Training
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.worker import Worker
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.protocol.flower.courier.mail import Mail
from mpunlearn.protocol.flower.courier.spool import exchange
from mpunlearn.protocol.identity import Identity
from mpunlearn.server.federation import Federation
from mpunlearn.server.network.coordinator import Coordinator
from mpunlearn.server.rounds import Rounds

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

    def start_server(self, trusted: list[str] | None = None) -> None:
        """Starts the coordinator, or starts it again."""
        server = self.folder / "server"
        perturbation = Perturbation(**{"copies": self.copies, "kappa": 0.02, **self.perturbation})
        rounds = Rounds(server, self.final, self.model, None, self.rounds, 1.0, "cpu", perturbation)
        self.coordinator = Coordinator(rounds, self.federation, self.training, trusted or [], self.said.append)
        self.mail = Mail(self.coordinator.mail)

    def start_worker(self, number: int) -> Worker:
        """Starts a worker, or starts it again."""
        policy = Policy(self.coordinator.identity.public, **self.policy)
        folder = self.folder / f"work-{number}"
        return Worker(
            self.spool(number),
            folder,
            policy,
            forget=self.forget[number],
            retain=self.retain,
            say=self.said.append,
        )

    def identity(self, number: int) -> Identity:
        return Identity.at(self.folder / f"work-{number}" / "identity.key")

    def carry(self) -> None:
        """What Flower does: to every node and back."""
        for number in range(len(self.workers)):
            node = str(number + 1)
            (self.coordinator.mail / "nodes" / node).touch()
            record = self.mail.load(node)
            if record is None:
                continue
            deliver = dict(zip(record["names"], record["jobs"], strict=True))
            found, missing = exchange(self.spool(number), deliver, record["wanted"], 0.0)
            if self.tamper is not None:
                changed = {name: self.tamper(node, name, data) for name, data in found.items()}
                found = {name: data for name, data in changed.items() if data is not None}
            self.mail.unload(node, {"names": list(found), "results": list(found.values()), "missing": missing})

    def turn(self) -> bool:
        """Everybody does what can be done now."""
        done = self.coordinator.step()
        self.carry()
        for number, worker in enumerate(self.workers):
            if number not in self.silent or self.identity(number).public not in self.coordinator._roster()["clients"]:
                worker.step()
        self.carry()
        return done

    def run(self, turns: int = 60) -> Path:
        """Turns until the run is complete."""
        for _ in range(turns):
            if self.turn():
                return self.final
        raise AssertionError(f"not complete after {turns} turns: {self.said}")
