"""Fuzzes one target with atheris, or all of them one after the other.

    python -m tests.fuzz.fuzz [--seconds 60] [TARGET ...]

Inputs that find something are written to tests/fuzz/crashers/TARGET-…, where `test_crashers` picks them up. What was
learned is kept in tests/fuzz/corpus, which git ignores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def fuzz(name: str, seconds: int) -> None:
    """Fuzzes a target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["mpunlearn"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = HERE / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=65536"]
    atheris.Setup([name, *limits, f"-artifact_prefix={HERE / 'crashers'}/{name}-", str(corpus)], target)
    atheris.Fuzz()


def main() -> None:
    """Fuzzes the targets that are named, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        fuzz(arguments.targets[0], arguments.seconds)
        return
    from tests.fuzz.targets import TARGETS

    failed = []
    for name in arguments.targets or TARGETS:
        print(f"fuzzing {name} for {arguments.seconds} s", flush=True)
        command = [sys.executable, "-m", "tests.fuzz.fuzz", "--here", "--seconds", str(arguments.seconds), name]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"found something in {', '.join(failed)}; see {HERE / 'crashers'}")


if __name__ == "__main__":
    main()
