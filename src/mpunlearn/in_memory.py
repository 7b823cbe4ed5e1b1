"""MPU for models in memory: `publish` and `aggregate` instead of `preprocess` and `postprocess`.

For experiments in a notebook or a script with a GPU. Copies and results are models of transformers, and any training code
can stand between the two functions. The model is saved to a temporary folder, and the functions for directories do the
work (see `lm.memory`), so the results are the same to the last bit. The copies stay in that folder and are loaded one at a
time, so that memory has to hold only one of them.

The secret state stays in a directory of the user, as for `preprocess`: noise must never be used twice, even after a crash.
"""

import shutil
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any

from mpunlearn.extras import needs
from mpunlearn.server.perturbation import Perturbation

if TYPE_CHECKING:
    from mpunlearn.server.preprocess import Published


class Copies(Sequence[Any]):
    """The published copies of a round. `copies[k]` loads copy k + 1, in its published dtype, on the model's device.

    A copy knows its run, round and number (`model.config.mpunlearn`). The files are removed with this object.
    """

    def __init__(self, published: "Published", model: Any, folder: Path) -> None:
        self.published = published
        """What `preprocess` returns: the paths of the copies, and how much of their noise survived rounding."""
        self._kind, self._device = type(model), model.device
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.published.copies)

    def __getitem__(self, number: int | slice) -> Any:
        from mpunlearn.lm.memory import load_like

        if isinstance(number, slice):
            return [self[index] for index in range(len(self))[number]]
        return load_like(self.published.copies[number], self._kind, self._device)


def publish(
    model: Any,
    *,
    state: str | Path,
    tokenizer: Any = None,
    folder: str | Path | None = None,
    base: str | Path | None = None,
    stand_in: str | Path | None = None,
    lineage: str | Path | None = None,
    device: str = "cpu",
    perturbation: Perturbation | None = None,
) -> Copies:
    """Publishes the copies of the next round of a model in memory, like `preprocess`.

    Example:
        With a model and a tokenizer of transformers, and a list of texts:

        >>> training = mpunlearn.Training(objective="grad-ascent", epochs=1, learning_rate=1e-3)
        >>> copies = mpunlearn.publish(model, tokenizer=tokenizer, state="state")
        >>> updates = (
        ...     mpunlearn.forget(copy, tokenizer=tokenizer, forget=texts, training=training) for copy in copies
        ... )
        >>> unlearned = mpunlearn.aggregate(model, updates, state="state")

    Args:
        model: The server's model θ, a model of transformers. It is not changed.
        state: Directory of the server's secret state. It is created in the first round and shared by all rounds.
        tokenizer: The tokenizer, which the copies then have, too.
        folder: Where the temporary folder of the copies is created (default: the system's). It needs space for the model
            and all copies; /dev/shm keeps them in memory.
        base: As for `preprocess`, like all other arguments.
        stand_in: See `preprocess`.
        lineage: See `preprocess`.
        device: See `preprocess`.
        perturbation: Number of copies, noise level, reparameterization.

    Returns:
        The copies, which are loaded one at a time.

    Raises:
        PlanError: `model` is not a model of transformers, or has adapters.
        MPUError: As `preprocess` does.
    """
    needs("client", "publish")
    from mpunlearn.lm.memory import save_model
    from mpunlearn.server.preprocess import preprocess

    temporary = Path(mkdtemp(prefix="mpunlearn-", dir=folder))
    try:
        published = preprocess(
            save_model(model, temporary / "model", tokenizer),
            state=state,
            out=temporary / "copies",
            base=base,
            stand_in=stand_in,
            lineage=lineage,
            device=device,
            perturbation=perturbation,
        )
        return Copies(published, model, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def aggregate(
    model: Any,
    updates: Iterable[Any],
    *,
    state: str | Path,
    eta: float = 1.0,
    dtype: str | None = None,
    folder: str | Path | None = None,
    device: str = "cpu",
) -> Any:
    """Aggregates the updates of the open round into a new model, like `postprocess`. `publish` has an example.

    Args:
        model: The model that was given to `publish`. It is not changed.
        updates: For each copy, in any order: the model that was trained from it, also one with a LoRA adapter of PEFT, or
            a directory that `postprocess` accepts. A generator needs memory for only one trained model at a time. A model
            of dtype bfloat16 has rounded its update; to avoid that, train `copy.float()`, or give what `unlearn` writes.
        state: Directory of the server's secret state.
        eta: Server step size η.
        dtype: Dtype of the result (default: that of the run's first model). Between rounds, float32 preserves small
            changes that bfloat16 would round away.
        folder: Where the temporary folder of the updates is created (default: the system's).
        device: Device of the computation, cpu or cuda.

    Returns:
        A new model of the same class and on the same device as `model`.

    Raises:
        PlanError: An update is neither a model nor a path.
        StateError: The model is not the one that was published.
        MPUError: As `postprocess` does.
    """
    needs("client", "aggregate")
    from mpunlearn.lm.memory import load_like, save_model, save_trained
    from mpunlearn.server.postprocess import postprocess

    with TemporaryDirectory(prefix="mpunlearn-", dir=folder) as name:
        source = save_model(model, Path(name) / "model")  # before the updates, which may have yet to be trained
        paths = []
        for number, update in enumerate(updates, start=1):
            given = isinstance(update, str | Path)
            paths.append(Path(update) if given else save_trained(update, Path(name) / f"update-{number}"))
            del update
        result = postprocess(
            paths, state=state, out=Path(name) / "result", eta=eta, checkpoint=source, dtype=dtype, device=device
        )
        return load_like(result, type(model), model.device)
