"""The report as files: what it finds, what it leaves out, whose page says what, and what it refuses."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.runs import ANSWER, AUDIT, CLIENT_AUDIT, PLAN, TRAINING, bare, evaluation, full, put

from mpunlearn.cli import main
from mpunlearn.errors import FileError, PlanError, SchemaError, StateError
from mpunlearn.report.content import client_page, server_page
from mpunlearn.report.data import RecordSummary
from mpunlearn.report.page import render
from mpunlearn.report.read import Sources, read_run
from mpunlearn.report.report import report


class Outline(HTMLParser):
    """The headings, texts and tags of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if data.strip() and not {"style", "script"} & set(self._open):
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def sections(self) -> list[str]:
        return [str(attrs["id"]) for tag, attrs in self.tags if tag == "section"]


def pages(run: Path, **options) -> dict[str, Outline]:
    return {party: Outline(Path(path)) for party, path in report(run, **options).pages.items()}


def test_a_bare_run_gets_a_page_without_empty_sections(tmp_path: Path) -> None:
    found = pages(bare(tmp_path / "run"))
    assert found["server"].sections == ["summary", "details"]
    assert found["client"].sections == ["summary", "training", "details"]
    assert "Nobody has measured yet whether the texts were forgotten" in found["server"].text
    assert 'class="card"' not in (tmp_path / "run" / "report-server.html").read_text()


def test_everything_that_is_there_is_shown(tmp_path: Path) -> None:
    found = pages(full(tmp_path / "run"))
    assert found["server"].sections == ["summary", "rounds", "metrics", "audit", "details"]
    assert found["client"].sections == ["summary", "rounds", "answers", "metrics", "training", "audit", "details"]
    for page in found.values():
        assert "7 questions" in page.text
        assert {"0.990", "0.030", "0.020"} <= set(page.texts)  # before, after, retrained
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        links = {str(attrs["href"])[1:] for tag, attrs in page.tags if tag == "a"}
        assert links <= set(ids)


def test_evaluations_are_found_and_named(tmp_path: Path) -> None:
    """As a user gives them: one file for the run, the others with labels; a named one replaces one that was found."""
    run = bare(tmp_path / "run")
    put(run / "evaluations" / "original.json", evaluation(0.7, 0.7))
    own, first = put(tmp_path / "result.json", evaluation(0.03, 0.95)), put(tmp_path / "a=b.json", evaluation(0.9, 0.9))
    server, client = read_run(run, Sources([own, f"original={first}", f"run@1={own}"]))
    assert server is not None
    assert client is not None
    assert server.evaluations == client.evaluations
    assert [(item.label, item.round, item.metrics["forget_Q_A_Prob"]) for item in server.evaluations] == [
        ("original", None, 0.9),
        ("run", None, 0.03),
        ("run", 1, 0.03),
        ("retrained", None, 0.02),
    ]
    assert main(["report", str(run), "--evaluation", str(own), "--evaluation", f"original={first}", "--quiet"]) == 0
    header = re.findall(r"<button type=\"button\">(.*?)</button>", (run / "report-server.html").read_text())
    assert header[:4] == ["metric", "original", "this run", "retrained"]


def test_a_party_alone_gets_its_own_page_only(tmp_path: Path) -> None:
    served, work = tmp_path / "served", tmp_path / "work"
    put(served / "plan.json", {**PLAN, "service": {"host": "h", "port": 1, "listen": "l"}})
    put(work / "run.json", {"run": "1" * 32, "rounds": 2, "copies": 3, "training": TRAINING})
    for number in (1, 2, 10):
        put(work / "audit" / f"round-{number}.json", {**CLIENT_AUDIT, "updates": number})
    assert list(pages(served)) == ["server"]
    found = pages(work)
    assert list(found) == ["client"]
    assert "10 updates attacked" in found["client"].text  # the latest round's audit, by number
    assert "over a network" in found["client"].text
    assert sorted(path.name for path in work.iterdir()) == ["audit", "report-client.html", "run.json"]


def test_what_is_private_to_one_party_is_not_on_the_others_page(tmp_path: Path) -> None:
    found = pages(full(tmp_path / "run"))
    server, client = found["server"].text, found["client"].text
    noise, floor, digest = "0.0525", "0.116", "f" * 64
    assert noise in server
    assert floor in server
    assert "seven-billion" in server
    assert "/models" not in server
    assert digest in client
    assert ANSWER["question"] in client
    assert not any(text in client for text in (noise, floor, "seven-billion", "/secret"))
    assert not any(text in server for text in (digest, *(ANSWER[key] for key in ("question", "expected", "before"))))
    assert "0.810" not in server  # the client's audit
    for path in (tmp_path / "run").glob("*.html"):
        assert path.stat().st_mode & 0o077 == 0


def test_old_plans_can_be_read(tmp_path: Path) -> None:
    old = {"host": "h", "port": 1, "listen": "l", "superlink": None, "clients": [], "federation": {}}
    plan = {**PLAN, **old, "perturbation": {"copies": 3, "kappa": 0.05}}
    del plan["format"], plan["service"]
    put(tmp_path / "plan.json", plan)
    (page,) = pages(tmp_path).values()
    assert "over a network" in page.text
    assert "no common noise" in page.text
    assert "not finished" in page.text


HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"


def test_whatever_files_contain_stays_text(tmp_path: Path) -> None:
    run = full(tmp_path / "run")
    name = HOSTILE.replace("/", "∕")
    put(run / "evaluations" / f"{name}.json", evaluation(0.5, 0.5, **{HOSTILE: 0.5}))
    put(run / "evaluations" / f"{name}@1.json", evaluation(0.5, 0.5))
    put(
        run / "server" / "plan.json",
        {**PLAN, "checkpoint": f"/m/{name}", "training": {**TRAINING, "objective": HOSTILE}},
    )
    put(
        run / "server" / "audit.json",
        {**AUDIT, "attacks": {HOSTILE: {**AUDIT["attacks"]["all copies"], "exposed": HOSTILE}}},
    )
    put(
        run / "client" / "audit.json",
        {**CLIENT_AUDIT, "tokens": {HOSTILE: {"auc": 0.9, "precision": 0.4, "chance": 0.2}}},
    )
    put(run / "client" / "answers.json", {"answers": [dict.fromkeys(ANSWER, HOSTILE)]})
    server, client = read_run(run, Sources())
    assert server is not None
    assert client is not None
    record = RecordSummary(HOSTILE, ((HOSTILE, HOSTILE),), False, (HOSTILE,))
    for party, page in {"server": server_page(server, record), "client": client_page(client, record)}.items():
        file = tmp_path / f"{party}.html"
        file.write_text(render(page, HOSTILE), encoding="utf-8")
        outline = Outline(file)
        assert [tag for tag, _ in outline.tags if tag in ("script", "img", "iframe", "object")] == ["script"]
        assert not any(key.startswith("on") for _, attrs in outline.tags for key in attrs)
        assert HOSTILE in outline.text


def test_a_page_names_nothing_to_load(tmp_path: Path) -> None:
    for page in pages(full(tmp_path / "run")).values():
        names = [
            (tag, attrs[key]) for tag, attrs in page.tags for key in ("src", "href", "data", "action") if key in attrs
        ]
        assert all(str(value).startswith(("#", "data:,")) for _, value in names)
        policy = next(
            attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
        )
        assert policy is not None
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert not any("style" in attrs for _, attrs in page.tags)  # the policy would forbid it
    for path in (tmp_path / "run").glob("*.html"):
        assert path.stat().st_size < 100_000
        assert not re.search(r"url\(|@import|https?:", path.read_text())


def test_a_record_is_shown_with_its_verdict(tmp_path: Path) -> None:
    server, _ = read_run(bare(tmp_path / "run"), Sources())
    assert server is not None
    good = render(server_page(server, RecordSummary("MPU-7", (("2026-01-02", "Round 1 was closed."),))), "today")
    bad = render(server_page(server, RecordSummary("MPU-7", (), False, ("line 3 was changed",))), "today")
    assert "MPU-7" in good
    assert "Round 1 was closed." in good
    assert "checked and are right" in good
    assert "line 3 was changed" in bad
    assert "The check of the record failed" in bad
    assert "checked and are right" not in bad


def test_a_page_is_replaced_but_nothing_else_is(tmp_path: Path) -> None:
    run, out = bare(tmp_path / "run"), tmp_path / "out"
    report(run, out=out)
    report(run, out=out)
    (out / "report-client.html").write_text("my own notes")
    before = (out / "report-server.html").read_bytes()
    put(run / "server" / "plan.json", {**PLAN, "rounds": 3})
    with pytest.raises(FileError, match="exists and is not a report"):
        report(run, out=out)
    assert (out / "report-client.html").read_text() == "my own notes"
    assert (out / "report-server.html").read_bytes() == before
    (out / "report-client.html").unlink()
    (out / "report-client.html").mkdir()
    with pytest.raises(FileError, match="exists and is not a report"):
        report(run, out=out)


def test_mistakes_are_explained(tmp_path: Path, capsys) -> None:
    run = full(tmp_path / "run")
    cases = {
        ("missing",): "contains no run",
        (str(run), "--evaluation", "nothing.json"): "cannot be read",
        (str(run), "--evaluation", "=nothing.json"): "no label",
        (str(run), "--audit", str(run / "client" / "audit.json")): "no attacks",
        (str(run), "--client-audit", str(run / "server" / "audit.json")): "no separations",
        (str(run), "--answers", str(run / "server" / "audit.json")): "sample answers",
        (str(run), "--evaluation", str(run / "server" / "audit.json")): "no metrics",
        (str(run / "server"), "--answers", "answers.json"): "for the client's page",
    }
    for arguments, expected in cases.items():
        assert main(["report", *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert expected in error, error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("server/plan.json", {**PLAN, "perturbation": 3}),
        ("server/plan.json", {**PLAN, "training": {**TRAINING, "epochs": "two"}}),
        ("server/audit.json", {**AUDIT, "attacks": {}}),
        ("server/audit.json", {**AUDIT, "attacks": {"one": {"error": "small"}}}),
        ("client/audit.json", {**CLIENT_AUDIT, "separations": {"floor": 1}}),
        ("client/answers.json", {"answers": [{"question": 3}]}),
        ("evaluations/run.json", {"metrics": {"forget_Q_A_Prob": "high"}}),
        ("evaluations/run.json", {"metrics": {"forget_Q_A_Prob": 1e999}}),
        ("evaluations/run.json", []),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, file: str, content: object) -> None:
    run = full(tmp_path / "run")
    put(run / file, content)
    with pytest.raises((SchemaError, FileError, PlanError, StateError), match=re.escape(file)):
        report(run)
    assert not list(run.glob("*.html"))


def test_it_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from mpunlearn.report.report import report; report(sys.argv[1]); "
        "sys.exit(', '.join({'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(full(tmp_path / "run"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_result_is_json_too(tmp_path: Path, capsys) -> None:
    run = bare(tmp_path / "run")
    assert main(["report", str(run), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "pages": {party: str(run / f"report-{party}.html") for party in ("server", "client")},
        "evaluated": False,
    }


@pytest.mark.parametrize(
    ("perturbation", "expected"),
    [
        ({"copies": 3, "kappa": 0.05, "common_noise": "auto"}, "secret noise that all copies share"),
        ({"copies": 3, "kappa": 0.05, "common_noise": 0.1}, "secret noise that all copies share"),
        ({"copies": 3, "kappa": 0.05, "common_noise": 0.0}, "can compute the parameters almost exactly"),
        ({"copies": 1, "kappa": 0.05, "common_noise": 0.0}, "noise of its own and none that lasts"),
        ({"copies": 1, "kappa": 0.0, "common_noise": 0.0}, "the model itself, with its parameters rearranged."),
        ({"copies": 1, "kappa": 0.0, "common_noise": 0.0, "reparameterization": "none"}, "each is the model itself."),
    ],
)
def test_what_the_client_could_learn_follows_the_plan(tmp_path: Path, perturbation: dict, expected: str) -> None:
    put(bare(tmp_path / "run") / "server" / "plan.json", {**PLAN, "perturbation": perturbation})
    found = pages(tmp_path / "run")
    assert expected in found["server"].text
    assert expected not in found["client"].text


def test_several_clients_are_named(tmp_path: Path) -> None:
    put(tmp_path / "plan.json", {**PLAN, "service": {"host": "h", "federation": {"clients": 4}}})
    (page,) = pages(tmp_path).values()
    assert "4 clients unlearned their texts" in page.text


def test_only_an_evaluation_of_the_run_counts_as_measured(tmp_path: Path) -> None:
    run = bare(tmp_path / "run")
    put(run / "evaluations" / "noise-free.json", evaluation(0.02, 0.9))
    assert report(run).evaluated is False
    assert "Nobody has measured yet" in pages(run)["server"].text
    put(run / "evaluations" / "run.json", evaluation(0.02, 0.9))
    assert report(run).evaluated is True
    assert "Nobody has measured yet" not in pages(run)["server"].text


def test_the_runs_model_is_its_last_round(tmp_path: Path) -> None:
    run = full(tmp_path / "run")
    for number in (1, 2):
        (run / "evaluations" / f"run@{number}.json").unlink()
    put(run / "evaluations" / "run@1.json", evaluation(0.5, 0.9))
    assert "MPU, this run: from 0.990 (round 0) to 0.030 (round 2);" in (pages(run)["server"].text)


def test_muse_has_its_own_words(tmp_path: Path) -> None:
    run = bare(tmp_path / "run")
    for name in ("run", "run@1"):
        metrics = {"forget_knowmem_ROUGE": 0.3, "retain_knowmem_ROUGE": 0.4, "forget_verbmem_ROUGE": 0.2}
        put(run / "evaluations" / f"{name}.json", {"metrics": metrics})
    page = pages(run)["server"]
    assert "Overlap of answers with the right ones (ROUGE-L)." in page.text
    assert "robability" not in page.text
    assert "Forget: overlap of a verbatim continuation (ROUGE-L)" in page.texts


def test_a_client_knows_from_its_losses_whether_the_run_is_finished(tmp_path: Path) -> None:
    put(tmp_path / "run.json", {"run": "1" * 32, "rounds": 2, "copies": 3, "training": TRAINING})
    line = {"round": 1, "copy": 1, "probability_before": 0.9, "probability_after": 0.2}
    losses = tmp_path / "memory" / "losses.jsonl"
    losses.parent.mkdir()
    losses.write_text(json.dumps(line))
    assert "not finished" in pages(tmp_path)["client"].text
    losses.write_text(json.dumps({**line, "round": 2}))
    assert "not finished" not in pages(tmp_path)["client"].text
