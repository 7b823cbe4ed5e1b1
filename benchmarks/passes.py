"""Measures the server's two passes at the shapes of real models: seconds, GB/s, peak memory, ratio to a lower bound.

Builds a random checkpoint with the shapes of a real model, streaming, so that it need not fit in memory. Then runs the
following, each in its own process so that peak memory and bytes read are measured separately: Pre-Process (m copies, noise
in every tensor, `paper` reparameterization), Post-Process on m synthetic updates, and, for models that fit in memory, a
direct implementation of the paper's formulas with `torch.randn` that does not write its result. The lower bound ("floor") of
Pre-Process is the time to read and write its bytes at the speed of the disk plus the time to generate its normals, both
measured in the same run with the same number of threads. For Post-Process it is the time to copy the same bytes.

    python benchmarks/passes.py [--model qwen2.5-0.5b] [--copies 3] [--layers N] [--out DIR] [--no-dense]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mpunlearn.checkpoint import Checkpoint
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from mpunlearn.server.secret import Secret
from mpunlearn.server.stream import THREADS
from mpunlearn.tables import markdown
from shapes import MODELS, build, synthetic_update

KAPPA = 0.01


def dense(checkpoint: Path, copies: int) -> None:
    """A direct implementation of the paper's Pre-Process: whole tensors, torch.randn, all copies in memory."""
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim", config["hidden_size"] // heads)
    theta = {name: t for file in sorted(checkpoint.glob("*.safetensors")) for name, t in load_file(file).items()}
    blocks: dict[str, list[str]] = {}
    for name in theta:
        blocks.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name, []).append(name)
    alphas = torch.linspace(1, 2, copies)
    published: list[dict[str, torch.Tensor]] = [{} for _ in range(copies)]
    for names in blocks.values():
        weights = {name: theta[name].float() for name in names}
        sigma = KAPPA * torch.cat([weight.flatten() for weight in weights.values()]).square().mean().sqrt()
        for name, weight in weights.items():
            z = torch.stack([torch.randn_like(weight) for _ in range(copies)])
            noise = sigma * (copies / (copies - 1)) ** 0.5 * (z - z.mean(dim=0))
            for k in range(copies):
                published[k][name] = weight + alphas[k] * noise[k]
        if len(names) == 1:
            continue
        prefix = names[0].split(".self_attn")[0].split(".mlp")[0].rsplit(".input", 1)[0].rsplit(".post", 1)[0]
        for k in range(copies):
            reparameterize(published[k], prefix, heads, groups, dim)
    for copy in published:
        for name in copy:
            copy[name] = copy[name].to(torch.bfloat16)


def reparameterize(weights: dict[str, torch.Tensor], prefix: str, heads: int, groups: int, dim: int) -> None:
    """Rotates the RoPE planes of q, k, v and o, and permutes the FFN channels, in one layer."""
    angle = torch.rand(groups, dim // 2) * 6.2831853
    s = torch.zeros(groups, dim, dim)
    i = torch.arange(dim // 2)
    s[:, i, i] = s[:, i + dim // 2, i + dim // 2] = angle.cos()
    s[:, i + dim // 2, i], s[:, i, i + dim // 2] = angle.sin(), -angle.sin()
    u = s.repeat_interleave(heads // groups, dim=0)
    for part, rotation in (("q", u), ("k", s), ("v", s)):
        for kind in ("weight", "bias"):
            name = f"{prefix}.self_attn.{part}_proj.{kind}"
            if name in weights:
                weights[name] = (rotation @ weights[name].view(len(rotation), dim, -1)).view(weights[name].shape)
    name = f"{prefix}.self_attn.o_proj.weight"
    rotated = weights[name].view(-1, heads, 1, dim) @ u.mT
    weights[name] = rotated.view(weights[name].shape)
    order = torch.randperm(len(weights[f"{prefix}.mlp.up_proj.weight"]))
    for part in ("gate", "up"):
        weights[f"{prefix}.mlp.{part}_proj.weight"] = weights[f"{prefix}.mlp.{part}_proj.weight"][order]
    weights[f"{prefix}.mlp.down_proj.weight"] = weights[f"{prefix}.mlp.down_proj.weight"][:, order]


def normals_per_second() -> float:
    """The rate of generating normals from the keystream, on as many threads as the passes use."""
    stream, count, calls = Secret.generate().stream("rate"), 1 << 18, 40

    def work(number: int) -> None:
        stream.normals(count, number * count)

    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, range(THREADS)))
        begin = time.perf_counter()
        list(pool.map(work, range(calls)))
        return calls * count / (time.perf_counter() - begin)


def disk_rates(folder: Path, size: int = 1 << 30) -> tuple[float, float]:
    """Bytes per second for writing a file with a sync, and for reading it back from the page cache."""
    data, path = os.urandom(1 << 24), folder / "rate.bin"
    begin = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size >> 24):
            file.write(data)
        os.fsync(file.fileno())
    written = size / (time.perf_counter() - begin)
    begin = time.perf_counter()
    buffer = bytearray(1 << 24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = size / (time.perf_counter() - begin)
    path.unlink()
    return written, read


def measured(what: str, arguments: list[str]) -> dict[str, float]:
    """Runs one step of this file in its own process; returns its seconds (without start-up) and peak memory in GB."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", what, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    measurement: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measurement


def step(what: str, arguments: list[str]) -> None:
    """Runs one step, in its own process, and prints its measurements."""
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    actions: dict[str, Callable[[], object]] = {
        "preprocess": lambda: preprocess(
            arguments[0],
            state=arguments[1],
            out=arguments[2],
            perturbation=Perturbation(
                copies=int(arguments[3]), kappa=KAPPA, common_noise=0, reparameterization="paper"
            ),
        ),
        "postprocess": lambda: postprocess(arguments[2:], state=arguments[0], out=arguments[1]),
        "dense": lambda: dense(Path(arguments[0]), int(arguments[1])),
    }
    begin = time.perf_counter()
    actions[what]()
    seconds = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    counted = {"cpu": cpu, "peak_gb": usage.ru_maxrss / 1e6, "idle_gb": idle / 1e6, "read_gb": bytes_read() / 1e9}
    print(json.dumps({"seconds": seconds, **counted}))


def bytes_read() -> int:
    """The number of bytes that this process has read from files, also from the page cache; Linux counts them."""
    counts = Path("/proc/self/io")
    return int(counts.read_text().split("rchar: ")[1].split()[0]) if counts.exists() else 0


def copied(sources: list[Path], target: Path) -> float:
    """Seconds to read all sources and to write the bytes of the first one, with a sync: the floor of Post-Process."""
    begin = time.perf_counter()
    buffer = bytearray(1 << 24)
    for number, source in enumerate(sources):
        for file in sorted(source.glob("*.safetensors")):
            with open(file, "rb", buffering=0) as read, open(target, "ab", buffering=0) as write:
                while count := read.readinto(buffer):
                    if number == 0:
                        write.write(memoryview(buffer)[:count])
                os.fsync(write.fileno())
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


def benchmark(model: str, copies: int, layers: int | None, out: Path, with_dense: bool) -> dict[str, Any]:
    """Runs all measurements for one model."""
    config = {**MODELS[model], **({"num_hidden_layers": layers} if layers else {})}
    source = build(out / "model", config)
    count = sum(info.nbytes for info in Checkpoint(source).tensors.values()) // 2
    written, read = disk_rates(out)
    rate = normals_per_second()
    pre = measured("preprocess", [str(source), str(out / "state"), str(out / "copies"), str(copies)])
    floor = (copies * 2 * count) / written + 2 * (2 * count) / read + (copies - 1) * count / rate
    updates = []
    for copy in sorted((out / "copies").iterdir()):
        updates.append(synthetic_update(copy, out / "updates" / copy.name))
        shutil.rmtree(copy)
    post = measured("postprocess", [str(out / "state"), str(out / "new"), *map(str, updates)])
    copy_seconds = copied([source, *updates], out / "copied.bin")
    moved = (2 + copies) * 2 * count / 1e9
    result: dict[str, Any] = {
        "model": model,
        "layers": config["num_hidden_layers"],
        "parameters": count,
        "copies": copies,
        "threads": THREADS,
        "preprocess": {**pre, "gb_per_s": moved / pre["seconds"], "ratio_to_floor": pre["seconds"] / floor},
        "postprocess": {**post, "gb_per_s": moved / post["seconds"], "ratio_to_copying": post["seconds"] / copy_seconds},
        "floor_seconds": floor,
        "copying_seconds": copy_seconds,
        "disk_write_gb_per_s": written / 1e9,
        "disk_read_gb_per_s": read / 1e9,
        "normals_m_per_s": rate / 1e6,
    }  # fmt: skip
    if with_dense:
        result["dense"] = measured("dense", [str(source), str(copies)])
        result["dense"]["ratio_to_preprocess"] = result["dense"]["seconds"] / pre["seconds"]
    return result


def table(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = []
    for name, key, ratio, what in (
        ("Pre-Process", "preprocess", "ratio_to_floor", "the floor"),
        ("Post-Process", "postprocess", "ratio_to_copying", "copying"),
        ("in memory, without writing", "dense", "ratio_to_preprocess", "Pre-Process"),
    ):
        if measurement := result.get(key):
            speed = f"{measurement['gb_per_s']:.2f}" if "gb_per_s" in measurement else ""
            peak, compared = f"{measurement['peak_gb']:.2f}", f"{measurement[ratio]:.2f} x {what}"
            rows.append([name, f"{measurement['seconds']:.1f}", speed, peak, compared])
    circumstances = (
        f"{result['model']}, {result['layers']} layers, {result['parameters'] / 1e9:.2f} G parameters, "
        f"{result['copies']} copies, {result['threads']} threads; disk {result['disk_write_gb_per_s']:.2f} GB/s written, "
        f"{result['disk_read_gb_per_s']:.2f} read; {result['normals_m_per_s']:.0f} M normals/s"
    )
    return f"{markdown(['pass', 'seconds', 'GB/s', 'peak memory, GB', 'compared with'], rows)}\n\n{circumstances}"


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--step":
        return step(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-0.5b")
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--layers", type=int, help="override the number of layers")
    parser.add_argument("--out", type=Path, help="folder for models, 6 x the size of the model (default: temporary)")
    parser.add_argument(
        "--dense", action=argparse.BooleanOptionalAction, default=True, help="also run the direct implementation"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        wanted = arguments.dense and arguments.model in ("tiny", "qwen2.5-0.5b")
        result = benchmark(arguments.model, arguments.copies, arguments.layers, Path(folder), wanted)
    print(json.dumps(result, indent=2))
    print(table(result))


if __name__ == "__main__":
    main()
