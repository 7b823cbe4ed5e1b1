"""What a run costs at 7B, 70B and 405B with 1, 10 and 1000 clients: bytes, hours and dollars, computed from shapes.

Nothing is trained and no weight is read. Every client gets every copy of every round (`--assign all`), trains on it, and sends
an update of it back. The text of each client, the training and its arithmetic are those of `recipes.py`; a LoRA update has rank
16. The server's passes take the bytes that they read and write divided by `--pass-rate`, per machine. Traffic takes its bytes
divided by `--network`, which is the server's connection, or the object store's if copies and updates go through one. Prices
are options, since they change; a copy that goes out of a cloud is what costs most.

    python benchmarks/scale.py [--pass-rate GB/s] [--network GB/s] [--gpu $/h] [--egress $/GB]

Not covered: failures and repetitions, storage by the month, and clients in the same cloud as the server, whose traffic is
often free.
"""

import argparse
from dataclasses import dataclass

from mpunlearn.planning.recommended import recommendation
from mpunlearn.planning.sizes import Shapes
from mpunlearn.presets import PRESETS
from mpunlearn.protocol.plan import Training
from mpunlearn.tables import markdown
from recipes import ANSWER_TOKENS, EXAMPLES, GPU_FLOPS, LORA_RANK, TOKENS
from shapes import MODELS

CLIENTS = (1, 10, 1000)
CASES = (("hardened", 0), ("hardened", LORA_RANK), ("lean", LORA_RANK))


@dataclass(frozen=True)
class Rates:
    """Speeds in GB/s and prices in dollars."""

    pass_rate: float
    network: float
    gpu: float
    """Per hour of one GPU."""
    egress: float
    """Per GB."""


def row(name: str, preset: str, lora_rank: int, clients: int, rates: Rates) -> list[str]:
    """One line of the table."""
    shapes = Shapes.of_config(MODELS[name])
    copies, rounds = int(PRESETS[preset]["copies"]), int(PRESETS[preset]["rounds"])
    epochs = int(recommendation("npo", shapes.parameters).options(rounds)["epochs"])
    training = Training("npo", epochs=epochs, lora_rank=lora_rank)
    copy, update = shapes.copy_bytes() / 1e9, shapes.update_bytes(training) / 1e9
    model, theta = shapes.model_bytes / 1e9, shapes.theta_bytes / 1e9
    down, up = clients * rounds * copies * copy, clients * rounds * copies * update
    # A round reads θ twice, writes the copies, reads the updates, and writes the next θ.
    moved = rounds * (2 * theta + copies * copy + clients * copies * update + theta) + model
    examples = 2 * EXAMPLES * epochs * rounds * copies
    flops = 4 * shapes.forward_flops(examples * TOKENS, examples * ANSWER_TOKENS)
    hours = flops / GPU_FLOPS / 3600
    dollars = clients * hours * rates.gpu + down * rates.egress
    return [
        name,
        preset + (f", LoRA {lora_rank}" if lora_rank else ""),
        str(clients),
        number(down),
        number(up),
        number(moved / rates.pass_rate / 3600),
        number((down + up) / rates.network / 3600),
        number(hours),
        number(dollars),
    ]


def number(value: float) -> str:
    """Two significant digits, with separators for thousands."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def table(rates: Rates) -> str:
    """The table, in Markdown."""
    header = (
        "model",
        "preset",
        "clients",
        "down, GB",
        "up, GB",
        "server's passes, h",
        "traffic, h",
        "GPU hours per client",
        "dollars in all",
    )
    models = ("llama-2-7b", "llama-3.1-70b", "llama-3.1-405b")
    return markdown(
        header, [row(name, *case, clients, rates) for name in models for case in CASES for clients in CLIENTS]
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass-rate", type=float, default=0.5, help="GB/s that a machine's passes read and write")
    parser.add_argument("--network", type=float, default=1.25, help="GB/s of the server's connection (10 Gbit/s)")
    parser.add_argument("--gpu", type=float, default=2.5, help="dollars for one hour of an H100")
    parser.add_argument("--egress", type=float, default=0.09, help="dollars for one GB that leaves the cloud")
    options = parser.parse_args()
    print(table(Rates(options.pass_rate, options.network, options.gpu, options.egress)))


if __name__ == "__main__":
    main()
