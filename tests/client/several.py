"""Runs command lines in several processes: `torchrun several.py FILE`, where FILE has a JSON list of command lines.

Files of updates may be small here, so that every process writes some. With `--kill N`, the last process kills itself in the
middle of the Nth checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

FAILED = 97
"""Exit code if a command line failed."""


def run_together(lines: list[list], folder: Path, count: int = 2, kill: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs command lines of mpunlearn, one after the other, in `count` processes."""
    file = folder / "lines.json"
    file.write_text(json.dumps([[str(part) for part in line] for line in lines]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*torchrun, __file__, str(file), str(kill)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def work() -> None:
    """One of the processes."""
    from torch.distributed.checkpoint import state_dict_saver

    from mpunlearn.cli import main
    from mpunlearn.client import update

    update.MIN_FILE_BYTES = 20_000
    kill, saves, save = int(sys.argv[2]), [], state_dict_saver.save

    def killed(*args, **kwargs):
        saves.append(None)
        if len(saves) == kill and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*args, **kwargs)

    state_dict_saver.save = killed
    codes = [main(line) for line in json.loads(Path(sys.argv[1]).read_text())]
    print("exit codes", codes)
    sys.exit(FAILED if any(codes) else 0)


if __name__ == "__main__":
    work()
