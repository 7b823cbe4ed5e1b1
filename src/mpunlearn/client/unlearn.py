"""Local unlearning: turns one published copy into one update.

    Δ'_k = A(θ_k; D_f, D_r) - θ_k        (arXiv 2602.23798, section on local unlearning)

θ_k is the k-th of the noisy copies of the model that the server publishes, D_f is the forget set and D_r the retain
set. The algorithm A is any of `protocol.objectives.OBJECTIVES`. `Client` does the work. It reads and tokenizes its
examples only once for all copies and rounds.
"""

from pathlib import Path

from mpunlearn.client.resources import Callback, Resources
from mpunlearn.extras import needs
from mpunlearn.lm.sources import Data, Source
from mpunlearn.protocol.plan import Training


def unlearn(
    copy: str | Path,
    *,
    forget: Source,
    out: str | Path,
    retain: Source | None = None,
    decoys: Source | None = None,
    memory: str | Path | None = None,
    device: str | None = None,
    training: Training | None = None,
    data: Data | None = None,
    resources: Resources | None = None,
    callback: Callback | None = None,
) -> Path:
    """Unlearns on one published copy and writes the update.

    Args:
        copy: A published copy. An ordinary checkpoint also works, but no server accepts its update.
        forget: What to forget: a file, a folder that `datasets` saved, a benchmark such as tofu/forget10, or
            hub:OWNER/NAME. Python programs can also give a list of texts or dicts, or a `datasets.Dataset`.
        out: A new directory for the update.
        retain: What to keep, in the same form. Objectives with a retain term need it. Without such data, give auto: the
            answers of the model to its own questions, or auto:SOURCE: a random choice from a larger set.
        decoys: Texts of the same kind that the model knows, in the same form. They are unlearned along with the forget set,
            and hide which of the texts it consists of.
        memory: The client's own directory for what later rounds need from round 1, and for the record of the run, which
            the update is then signed for. Objectives with a reference model need it from round 2 on.
        device: Device of the training, such as cpu or cuda (default: a GPU if there is one).
        training: The objective and its hyperparameters.
        data: How to read the examples.
        resources: Memory, precision, checkpoints and trackers.
        callback: Called after every optimizer step with its number and the losses.

    Returns:
        `out`.

    Raises:
        FileError: The copy cannot be read, or `out` exists or cannot be written.
        DataError: Examples cannot be read, or are missing.
        PlanError: An option has an impossible value, or --train selects nothing.
        RecordError: The copy's event.json does not verify. Remove that file if you changed the copy on purpose.
    """
    needs("client", "unlearn")
    from mpunlearn.client.client import Client
    from mpunlearn.client.recording import Recording
    from mpunlearn.lm.processes import is_main
    from mpunlearn.protocol.record.log import event_of

    client = Client(
        forget=forget,
        retain=retain,
        decoys=decoys,
        memory=memory,
        training=training,
        data=data,
        resources=resources,
        callback=callback,
        device=device,
    )
    if memory is None or not is_main():
        return client.unlearn(copy, out)
    recording, published = Recording(Path(memory), client.text_digests), event_of(Path(copy))
    recording.begin(published)
    update = client.unlearn(copy, out)
    recording.updated(published, update)
    return update
