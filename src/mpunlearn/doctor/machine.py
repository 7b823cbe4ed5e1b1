"""Checks of this machine: libraries, PyTorch and GPU, Flower, memory, disk, clock.

Nothing that a broken installation may lack is imported at the top level.
"""

import importlib.metadata
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpunlearn.doctor.findings import Finding, failed, ok, warning

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LITTLE_MEMORY, LITTLE_DISK = 4 << 30, 5 << 30
"""Bytes below which a warning is given: a model of 0.5 B parameters hardly fits."""
WRITTEN_BYTES = 64 << 20
"""How much is written to measure the rate of a disk."""
SLOW_DISK = 20e6
"""Bytes per second below which a warning is given."""
CLOCK_SECONDS = 5.0
"""Accepted difference between the clocks of this machine and of a file system. Heartbeats are modification times."""
FLOWER = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr")
"""Flower's programs that a run starts."""


def libraries() -> Finding:
    """Whether all required packages have the required versions."""
    from packaging.requirements import Requirement

    name = "libraries"
    try:
        required = [Requirement(text) for text in importlib.metadata.requires("mpunlearn") or []]
    except importlib.metadata.PackageNotFoundError:
        return failed(name, "mpunlearn is not installed in this environment", "run `pip install` in its directory")
    wrong = list(_unmet([one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]))
    if wrong:
        return failed(name, ", ".join(wrong), "install the missing versions with `pip install mpunlearn`")
    version = importlib.metadata.version("mpunlearn")
    return ok(name, f"mpunlearn {version}, Python {platform.python_version()}, all requirements met")


def _unmet(required: "list[Requirement]") -> Iterator[str]:
    """The requirements that are not met, as text."""
    for one in required:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{one.name} missing"
            continue
        if version not in one.specifier:
            yield f"{one.name} {version} (needs {one.specifier})"


def flower(needed: bool) -> Finding:
    """Whether Flower has the required version, and its programs are installed.

    Args:
        needed: whether the run that is checked needs Flower.
    """
    from packaging.requirements import Requirement

    with suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires("mpunlearn") or []:
            one = Requirement(text)
            if one.name == "flwr" and one.marker is not None and one.marker.evaluate({"extra": "network"}):
                return _flower(one, needed)
    return warning("Flower", "the required version is not known", "install mpunlearn in this environment")


def _flower(required: "Requirement", needed: bool) -> Finding:
    wrong = list(_unmet([required]))
    missing = [name for name in FLOWER if not (Path(sys.executable).parent / name).exists()]
    if not wrong and not missing:
        return ok("Flower", f"{importlib.metadata.version('flwr')}, and its programs")
    found = ", ".join([*wrong, *(f"{name} is not next to {sys.executable}" for name in missing[: 0 if wrong else 1])])
    advice = "run `pip install 'mpunlearn[network]'`"
    if needed:
        return failed("Flower", found, advice)
    return warning("Flower", found, f"for runs over a network, {advice}")


def torch_build() -> Finding:
    """Whether PyTorch can be loaded, and which devices it sees."""
    name = "PyTorch"
    try:
        import torch

        build = f"{torch.__version__}, {torch.get_num_threads()} threads"
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            gpus = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
            memory = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
            return ok(name, f"{build}, CUDA {torch.version.cuda}, {gpus}, {memory}")
    except Exception as error:  # a broken build fails with errors of many kinds
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        return failed(name, f"cannot be loaded ({reason:.150})", "install torch again; see https://pytorch.org")
    if Path("/dev/nvidia0").exists():
        return warning(
            name,
            f"{build}, but the GPU of this machine cannot be used (build for CUDA {torch.version.cuda or 'none'})",
            "install a CUDA build of torch that fits the driver, or training takes the CPU",
        )
    return ok(name, f"{build}, no GPU")


def memory() -> Finding:
    """How much memory is available."""
    available = available_memory()
    if available is None:
        return warning("memory", "this system does not say how much is available", "compare with `mpunlearn plan`")
    found = f"{available / 1e9:.1f} GB available"
    if available < LITTLE_MEMORY:
        return warning("memory", found, "compare with what `mpunlearn plan` says, and end other programs")
    return ok("memory", found)


def available_memory() -> int | None:
    """Memory that this process can still get, in bytes; None if the system does not say."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
    known = {line.split(":")[0]: line.split()[1] for line in lines}
    if "MemAvailable" not in known:
        return None
    limits = [int(known["MemAvailable"]) * 1024]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit is the word max
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        limits.append(max(0, int(limit) - int(used)))
    return min(limits)


def disk(folder: Path) -> Finding:
    """Whether a folder can be written to, how much space it has, and how fast it is."""
    place = _existing(folder)
    name, file = f"disk {place}", place / f".mpunlearn-doctor-{secrets.token_hex(4)}"
    data = secrets.token_bytes(1 << 20)
    try:
        free = shutil.disk_usage(place).free
        size = min(WRITTEN_BYTES, free // 2)
        begun = time.monotonic()
        with file.open("wb", buffering=0) as written:
            for _ in range(max(1, size // len(data))):
                if written.write(data) < len(data):
                    raise OSError(28, "no space left")
            os.fsync(written.fileno())
        rate = max(1, size // len(data)) * len(data) / (time.monotonic() - begun)
    except OSError as error:
        return failed(
            name, f"cannot be written: {error.strerror or error}", "free some space, or choose another folder"
        )
    finally:
        with suppress(OSError):
            file.unlink()
    found = f"{free / 1e9:.1f} GB free, writes {rate / 1e6:.0f} MB/s"
    if free < LITTLE_DISK or rate < SLOW_DISK:
        return warning(name, found, "compare with what `mpunlearn plan` says, or choose a larger or faster disk")
    return ok(name, found)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())


def clock(folder: Path) -> Finding:
    """Whether the clock is plausible, and agrees with the file system of a folder."""
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    advice = "set the clock, for example with NTP: certificates and deadlines depend on it"
    if now < Path(__file__).stat().st_mtime - 86400:
        return failed("clock", f"{shown}, before this program was installed", advice)
    place = _existing(folder)
    file = place / f".mpunlearn-doctor-{secrets.token_hex(4)}"
    try:
        file.write_bytes(b"x")
        difference = file.stat().st_mtime - time.time()
    except OSError:  # reported by `disk`
        return ok("clock", shown)
    finally:
        with suppress(OSError):
            file.unlink()
    if abs(difference) > CLOCK_SECONDS:
        return failed("clock", f"{shown}; the file system of {place} is {difference:+.0f} s off", advice)
    return ok("clock", shown)
