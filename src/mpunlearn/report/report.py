"""The command `report`: writes the report of a run as HTML, one page for each party.

    RUN/report-server.html    for the owner of the model; without any text of the client
    RUN/report-client.html    for the owner of the texts; with sample answers, if there are any

A run in one process has both parties' files, and gets both pages. In a run over a network, each party has its own files only,
and gets its own page only. The two pages are made from separate data (see `data`); what only one party may know is never read
for the other's.

Only JSON files are read, apart from the check of the record, which hashes the files that are at hand. So a report can be
written at any time and anywhere; it needs no model, no data and no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mpunlearn.errors import FileError
from mpunlearn.files import as_path, write_bytes


@dataclass(frozen=True)
class Report:
    """The pages that were written."""

    pages: dict[str, str]
    """Party → the page's path."""
    evaluated: bool
    """Whether there was an evaluation of the run's model."""

    def text(self) -> str:
        """The paths, one per line."""
        return "\n".join(self.pages.values())

    def to_json(self) -> dict[str, object]:
        """The result as JSON."""
        return {"pages": self.pages, "evaluated": self.evaluated}


def report(
    run: str | Path,
    *,
    evaluation: Sequence[str | Path] = (),
    audit: str | Path | None = None,
    client_audit: str | Path | None = None,
    answers: str | Path | None = None,
    out: str | Path | None = None,
) -> Report:
    """Writes the report of a run as HTML pages: report-server.html and report-client.html.

    Each page is one file that needs nothing else and can be printed. The server's page contains no text of the data to
    forget or to retain. For a directory that only one party has, only that party's page is written. Pages of an earlier
    report are replaced.

    Args:
        run: The directory of a run, in one process or over a network, or the --work of a client.
        evaluation: Result files of `evaluate`, as FILE for the run's model or as LABEL=FILE for any other, such as
            original=FILE for the model before unlearning. LABEL@ROUND=FILE is a model after a round, with the label run
            for this run, and is shown in a figure. Files RUN/evaluations/LABEL.json are found without this option.
        audit: Result file of `audit`, for the server's page (default: audit.json in the server's folder).
        client_audit: Result of `client audit --json`, for the client's page (default: audit.json in the client's folder,
            or the latest audit of a run over a network).
        answers: Sample answers, for the client's page (default: answers.json in the client's folder).
        out: Directory for the pages (default: RUN).

    Returns:
        The pages that were written.

    Raises:
        StateError: `run` contains no run.
        FileError: A file cannot be read, or a page cannot be written.
        SchemaError: A file does not have the expected content.
    """
    from mpunlearn.progress import say
    from mpunlearn.report.content import client_page, server_page
    from mpunlearn.report.data import THIS_RUN
    from mpunlearn.report.page import GENERATOR, render
    from mpunlearn.report.read import Sources, read_run
    from mpunlearn.report.record import record_summary

    folder = as_path(run, "RUN")
    target = as_path(out, "--out") if out is not None else folder
    named = [None if path is None else Path(path) for path in (audit, client_audit, answers)]
    server, client = read_run(folder, Sources(evaluation, *named))
    record = record_summary(folder)
    parties = {
        "server": None if server is None else server_page(server, record),
        "client": None if client is None else client_page(client, record),
    }
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    pages = {}
    for party, page in parties.items():
        path = target / f"report-{party}.html"
        if page is None:
            continue
        if path.exists() and not (path.is_file() and GENERATOR.encode() in path.read_bytes()[:4000]):
            raise FileError(f"{path}: exists and is not a report; name another --out, or remove this file")
        pages[party] = path, render(page, date)
    for path, content in pages.values():
        try:
            write_bytes(path, content.encode(), 0o600)
        except OSError as error:
            raise FileError(f"{path}: cannot be written: {error.strerror}; name another --out") from error
    sides = [side for side in (server, client) if side is not None]
    evaluated = any(item.label == THIS_RUN for side in sides for item in side.evaluations)
    if not evaluated:
        say(
            "no evaluation was found; give one with --evaluation FILE, which `mpunlearn evaluate MODEL --out FILE` writes"
        )
    return Report({party: str(path) for party, (path, _) in pages.items()}, evaluated)
