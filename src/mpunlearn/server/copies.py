"""Writes all published copies of a round in one pass over the model."""

import math
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorWriter, copy_companions
from mpunlearn.errors import DisclosureWarning
from mpunlearn.files import write_json
from mpunlearn.protocol.exchange import Card, derived_config
from mpunlearn.server.offset import Offset
from mpunlearn.server.publisher import Publisher
from mpunlearn.server.state import RoundingLeakage, RoundRecord, ServerState
from mpunlearn.server.stream import RowSlice, in_parallel, read, row_slices
from mpunlearn.server.workspace import Workspace

MIN_ENTROPY = 1.0
"""Residual entropy, in bits per entry, below which a warning says that rounding undoes the noise of a tensor."""


def write_copies(
    source: Checkpoint,
    architecture: Architecture,
    state: ServerState,
    record: RoundRecord,
    folder: Path,
    device: torch.device,
    offset: Offset,
) -> dict[str, RoundingLeakage]:
    """Streams the copies of a round into FOLDER/copy-1 … copy-m.

    Issues a `DisclosureWarning` if rounding undoes the noise, before the copies become visible.

    Returns:
        For each tensor, how much of the noise survived rounding; empty without noise.
    """
    publisher = Publisher(state.secret, record, architecture, device, offset)
    roles = architecture.tensor_roles(source)
    copies = publisher.design.copies
    specs = {name: (publisher.dtype(name), source.tensors[name].shape) for name in roles}
    with ExitStack() as stack:
        writers = []
        for copy in range(1, copies + 1):
            target = folder / f"copy-{copy}"
            target.mkdir()
            copy_companions(source.path, target)
            card = Card(state.run, record.round, copy, copies)
            write_json(target / "config.json", derived_config(source.config, specs, card))
            writers.append(stack.enter_context(TensorWriter(target, specs)))

        def work(rows: RowSlice, workspace: Workspace) -> tuple[list[int], int, float]:
            stored = read(source, rows.name, rows, workspace)
            published = publisher.publish(rows, stored, workspace)
            for writer, maps, values in zip(writers, publisher.maps, published.rows, strict=True):
                writer.write_rows(maps.published_name(rows.name, rows.role), rows.start, values)
            entropy = publisher.residual_entropy(rows, stored) if publisher.sigma(rows) else math.inf
            return published.equal, stored.numel(), entropy

        slices = row_slices(source, roles)
        results = in_parallel(slices, work, f"round {record.round}: publishing {copies} copies", len)
    if not publisher.design.draws:
        return {}
    rounding = _rounding(slices, results)
    for name, leakage in rounding.items():
        if leakage.entropy < MIN_ENTROPY:
            warnings.warn(
                f"rounding undoes the noise of {name} (and perhaps of other tensors): the residual entropy is "
                f"{leakage.entropy:.2f} bits per entry; raise --kappa, or use --noise-floor grid",
                DisclosureWarning,
                stacklevel=3,
            )
            break
    return rounding


def _rounding(slices: list[RowSlice], results: list[tuple[list[int], int, float]]) -> dict[str, RoundingLeakage]:
    """Combines the counts of the slices into the rounding leakage of each tensor."""
    parts: dict[str, list[tuple[list[int], int, float]]] = {}
    for rows, result in zip(slices, results, strict=True):
        if math.isfinite(result[2]):
            parts.setdefault(rows.name, []).append(result)
    rounding = {}
    for name, counted in parts.items():
        entries = sum(count for _, count, _ in counted)
        equal = max(sum(counts) for counts in zip(*(equal for equal, _, _ in counted), strict=True))
        entropy = sum(entropy * count for _, count, entropy in counted) / entries
        rounding[name] = RoundingLeakage(equal / entries, entropy)
    return rounding
