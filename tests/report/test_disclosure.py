"""No text of the client is on the server's page, after a real run with real answers."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

from mpunlearn.demo.models import TrainedWorld
from mpunlearn.demo.reporting import write_answers, write_metrics
from mpunlearn.demo.table import metrics_of, sets_of
from mpunlearn.local import run
from mpunlearn.protocol.plan import Training
from mpunlearn.report.report import report

SHINGLE = 5
"""Number of words in a row that count as a fragment of a text."""


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def fragments(text: str) -> set[str]:
    """All runs of `SHINGLE` words of a text, or the whole text if it is shorter."""
    found = words(text)
    return {" ".join(found[start : start + SHINGLE]) for start in range(max(1, len(found) - SHINGLE + 1))}


def shown(page: Path) -> str:
    """Every word of a page's file, also those in attributes, styles and scripts."""
    return f" {' '.join(words(unescape(page.read_text(encoding='utf-8'))))} "


@pytest.mark.slow
def test_the_servers_page_has_no_text_of_the_client(save_tiny, examples, tmp_path: Path) -> None:
    model, (forget, retain) = save_tiny(), examples
    world = TrainedWorld(tmp_path / "world")
    (world.path / "data").mkdir(parents=True)
    for split, source in (("forget", forget), ("retain", retain)):
        world.data(split).write_bytes(source.read_bytes())
    for path in (world.original, world.retrained):
        path.symlink_to(model)
    training = Training(objective="npo", epochs=1, batch_size=3, learning_rate=1e-3, max_length=64)
    out = tmp_path / "run"
    final = run(model, forget=forget, retain=retain, out=out, rounds=2, training=training, keep_models=True)
    assert (out / "server" / "round-1").is_dir()
    write_metrics(out, "run", metrics_of(final, sets_of(world), 8))
    write_answers(out / "client", world, final)
    assert (out / "client" / "answers.json").stat().st_mode & 0o077 == 0
    pages = {party: shown(Path(path)) for party, path in report(out).pages.items()}

    rows = [json.loads(line) for path in examples for line in path.read_text().splitlines()]
    texts = [text for row in rows for value in row.values() for text in (value if isinstance(value, list) else [value])]
    everything = {fragment for text in texts for fragment in fragments(text)}
    assert len(everything) > 200
    assert not [fragment for fragment in everything if f" {fragment} " in pages["server"]]
    # The control: the search finds what there is.
    samples = json.loads((out / "client" / "answers.json").read_text())["answers"]
    quoted = {fragment for sample in samples for key in ("question", "expected") for fragment in fragments(sample[key])}
    assert quoted <= everything
    assert all(f" {fragment} " in pages["client"] for fragment in quoted)
    # Nor does anything in the server's folder, or among the evaluations, quote the client.
    for folder in (out / "server", out / "evaluations"):
        for file in folder.rglob("*.json"):
            if file.parent.name not in ("round-1", "round-2"):  # checkpoints: the tokenizer's vocabulary
                content = f" {' '.join(words(file.read_text(encoding='utf-8')))} "
                assert not any(f" {fragment} " in content for fragment in everything), file
