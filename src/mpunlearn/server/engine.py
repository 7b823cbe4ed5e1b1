"""Where the shards of a pass are computed: on the threads of this process, or as tasks of Ray on several machines.

A task of Ray is one shard. It takes one CPU, and Ray repeats it elsewhere if its machine or process dies. It writes its
files itself, so θ, the updates and the directory of the result must be on a shared folder or in an object store that all
machines reach by the same name. Of the secret, it gets the keys of the streams of its shard (see `keys`). What a machine
then knows is the noise and the maps of the tensors in that shard, and θ itself if it looks: run Ray on your own machines.

Not covered: the first pass over θ, which measures it, and the digests of updates; both stay in this process.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mpunlearn.errors import MPUError, StateError
from mpunlearn.extras import needs
from mpunlearn.progress import Progress

RETRIES = 5
"""How often Ray repeats a task whose process or machine died."""
R = TypeVar("R")


def run_shards(
    engine: str, count: int, here: Callable[[int], R], task: Callable[[int], Callable[[], R]], what: str
) -> list[R]:
    """Computes the shards 0 … `count` - 1.

    Args:
        engine: where.
        count: number of shards.
        here: computes a shard in this process.
        task: makes the task of a shard, which can be pickled, and computes it when it is called.
        what: what is being done, for the progress bar.

    Returns:
        The results, in order.
    """
    if engine == "threads":
        return [here(number) for number in range(count)]
    return _on_ray(range(count), task, what)


def check_engine(engine: str) -> None:
    """Checks that an engine is installed.

    Raises:
        MissingPackageError: it is not.
    """
    if engine == "ray":
        needs("ray", "--engine ray")


def _on_ray(numbers: Iterable[int], task: Callable[[int], Callable[[], R]], what: str) -> list[R]:
    """Computes shards as tasks of the cluster that RAY_ADDRESS names or, without one, of one on this machine."""
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
    most = max(1, int(ray.cluster_resources().get("CPU", 1))) + 1
    waiting = list(numbers)
    running: dict[Any, int] = {}
    results: dict[int, R] = {}
    try:
        with Progress(len(waiting), what) as bar:
            while waiting or running:
                while waiting and len(running) < most:  # a task holds keys and matrices, so few are made at a time
                    number = waiting.pop(0)
                    running[remote.remote(task(number))] = number
                for done in ray.wait(list(running), num_returns=1)[0]:
                    results[running.pop(done)] = ray.get(done)
                    bar.update(1)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MPUError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise StateError(f"--engine ray: a task failed {RETRIES + 1} times: {reason}; repeat the command") from error
    finally:
        for left in running:
            ray.cancel(left, force=True)
    return [results[number] for number in sorted(results)]


def _call(task: Any) -> Any:
    """What a task of Ray runs."""
    return task()
