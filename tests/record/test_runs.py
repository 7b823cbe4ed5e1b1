"""The record of real runs: complete, true to the files, and every changed byte is noticed and named."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.perturbations import without_offset

from mpunlearn.client.client import Client
from mpunlearn.client.recording import Recording
from mpunlearn.client.unlearn import unlearn
from mpunlearn.errors import FileError, PlanError, RecordError, StateError, UpdateError
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.local import run
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.plan import Training
from mpunlearn.protocol.record.bundle import Bundle
from mpunlearn.protocol.record.canonical import file_bytes
from mpunlearn.protocol.record.log import Log, event_of
from mpunlearn.protocol.record.verification import verify
from mpunlearn.record import merge, open, show
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess

QUICK = Training(objective="npo", epochs=1, batch_size=3, learning_rate=1e-3, max_length=64)
FLIPS = 500
PRIVATE = ("secret.key", "state.json", "round-001.json", ".lock")
"""Working files of the server, which no event is about; so are those in the client's memory."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Where `done` keeps its run between tests."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def done(finished: Path, save_tiny, tmp_path: Path, examples) -> Path:
    """A finished run of one round with two copies, with everything that crossed between the parties."""
    forget, retain = examples
    model = save_tiny()
    if not finished.exists():
        noise = without_offset(copies=2, kappa=0.05)
        options = {"rounds": 1, "keep_exchange": True, "perturbation": noise, "training": QUICK}
        run(model, forget=forget, retain=retain, out=finished, **options)
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_verifies(done: Path, tmp_path: Path) -> None:
    found = verify([done], model=tmp_path / "model")
    assert found.problems == []
    assert [event.event.kind for event in found.bundle.events].count("published") == 2
    artifacts = list(done.rglob("event.json"))
    assert len(artifacts) == 5  # two copies, two updates, one result
    assert found.bundle.canonical_record["result"] == event_of(done / "final").event.digest
    plan = found.bundle.canonical_record["plan"]
    assert plan["training"]["learning_rate"] == "0.001"
    assert "kappa" not in json.dumps(found.bundle.canonical_record)  # noise levels are the server's


def test_each_party_alone_and_both_together_have_one_number(done: Path, tmp_path: Path) -> None:
    server = Bundle.read(done / "server" / "state" / "record.json")
    client = Bundle.read(done / "client" / "record.json")
    assert client.of_kind("aggregated") == []  # it has not seen what came of its updates
    assert (client.absent, server.absent) == ([], [])
    both = merge([done / "client", done / "server"], out=tmp_path / "both.json")
    assert Bundle.read(both).number == server.number == show(done).bundle.number


def test_the_record_tells_nothing_about_the_texts(done: Path, examples) -> None:
    content = (done / "server" / "state" / "record.json").read_text()
    for line in examples[0].read_text().splitlines():
        row = json.loads(line)
        assert row["answer"] not in content
    salts = json.loads((done / "client" / "commitments.json").read_text())["sets"]["forget"]
    assert len(salts) == len(examples[0].read_text().splitlines())
    for leaf in salts:
        assert leaf["salt"] not in content
        assert leaf["sha256"] not in content


@pytest.mark.slow
def test_every_changed_byte_makes_it_fail_and_is_named(done: Path) -> None:
    choice = random.Random(5)
    files = [path for path in sorted(done.rglob("*")) if path.is_file() and path.parent.name != "memory"]
    files = [path for path in files if not path.name.endswith(PRIVATE)]
    assert {path.name for path in files} >= {
        "record.json",
        "event.json",
        "commitments.json",
        "plan.json",
        "identity.key",
    }
    assert {path.name for path in files} >= {"model.safetensors", "update.safetensors", "update.json", "tokenizer.json"}
    for number in range(FLIPS):
        path = files[number] if number < len(files) else choice.choice(files)
        original = path.read_bytes()
        changed = bytearray(original)
        place = choice.randrange(len(changed))
        changed[place] ^= choice.randrange(1, 256)
        path.write_bytes(changed)
        problems = verify([done]).problems
        assert any(str(path) in problem for problem in problems), (path, place, problems)
        path.write_bytes(original)
    assert verify([done]).valid


def test_missing_and_additional_files_are_named(done: Path) -> None:
    copy = done / "exchange" / "round-1" / "copies" / "copy-2"
    (copy / "tokenizer.json").rename(done / "elsewhere.json")
    (done / "final" / "notes.txt").write_text("x")
    problems = "; ".join(verify([done]).problems)
    assert "copy-2/tokenizer.json: missing" in problems
    assert "final/notes.txt: not in the record" in problems


def test_a_dropped_event_is_noticed(done: Path) -> None:
    path = done / "server" / "state" / "record.json"
    bundle = Bundle.read(path)
    shutil.rmtree(done / "client")
    for number in range(len(bundle.events) - 1):  # the last one can be withheld, as the documentation says
        rest = bundle.events[:number] + bundle.events[number + 1 :]
        path.write_bytes(Bundle(rest, []).to_bytes())
        found = verify([done])
        assert found.bundle.absent or found.problems, number
        assert any("not in the record" in problem for problem in found.problems)


def test_a_text_of_the_forget_set_can_be_opened_and_no_other(done: Path, tmp_path: Path, examples) -> None:
    forget, retain = examples
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in forget.read_text().splitlines()[2:4]))
    opening = open(done / "client", forget=few, out=tmp_path / "opening.json")
    assert opening.stat().st_mode & 0o077 == 0
    assert verify([done], openings=[opening]).valid
    with pytest.raises(RecordError, match="not in the committed forget set"):
        open(done / "client", forget=retain, out=tmp_path / "no.json")
    changed = json.loads(opening.read_text())
    changed["openings"][0]["text"] = changed["openings"][0]["text"].replace("a", "b")
    opening.write_text(json.dumps(changed))
    assert "has committed to" in verify([done], openings=[opening]).problems[0]
    with pytest.raises(FileError, match="commitments"):
        open(done, forget=few, out=tmp_path / "no.json")
    with pytest.raises(PlanError, match="either"):
        open(done / "client", out=tmp_path / "no.json")


def test_another_model_is_noticed(done: Path, tmp_path: Path, save_tiny) -> None:
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("}", " }"))
    assert "config.json: changed" in verify([done], model=tmp_path / "model").problems[0]


def test_by_hand_with_three_commands_the_record_is_the_same_kind(save_tiny, tmp_path: Path, examples) -> None:
    forget, retain = examples
    state, options = tmp_path / "state", {"forget": forget, "retain": retain, "training": QUICK}
    copies = preprocess(save_tiny(), state=state, out=tmp_path / "c", perturbation=without_offset(copies=2)).copies
    updates = [unlearn(copy, out=tmp_path / "u" / copy.name, memory=tmp_path / "m", **options) for copy in copies]
    out = postprocess(updates, state=state, out=tmp_path / "o")
    assert verify([tmp_path]).problems == []
    evaluated = event_of(out)
    assert evaluated is not None
    assert len(evaluated.event.after) == 2
    assert show(state).to_json()["valid_event_count"] == 5


def test_an_update_that_was_changed_after_it_was_signed_is_not_aggregated(save_tiny, tmp_path: Path, examples) -> None:
    forget, retain = examples
    copies = preprocess(
        save_tiny(), state=tmp_path / "s", out=tmp_path / "c", perturbation=without_offset(copies=2)
    ).copies
    updates = []
    for copy in copies:
        place = {"out": tmp_path / "u" / copy.name, "memory": tmp_path / "m"}
        updates.append(unlearn(copy, forget=forget, retain=retain, training=QUICK, **place))
    signed = (updates[0] / "update.json").read_text()
    (updates[0] / "update.json").write_text(signed.replace("}", " }", 1))
    with pytest.raises(UpdateError, match="not what the client signed"):
        postprocess(updates, state=tmp_path / "s", out=tmp_path / "o")
    assert not (tmp_path / "o").exists()
    (updates[0] / "update.json").write_text(signed)
    shutil.copy(updates[1] / "event.json", updates[0] / "event.json")
    with pytest.raises(UpdateError):
        postprocess(updates, state=tmp_path / "s", out=tmp_path / "o")
    (updates[0] / "event.json").unlink()  # unsigned, as other tools leave it
    postprocess(updates, state=tmp_path / "s", out=tmp_path / "o")
    used = Bundle.read(tmp_path / "s" / "record.json").canonical_record["rounds"][0]["updates"]
    assert ["client" in one for one in used] == [False, True]


@pytest.mark.slow
def test_an_evaluation_of_the_result_is_recorded(done: Path, tmp_path: Path, examples) -> None:
    for name, source in (("forget.jsonl", examples[0]), ("retain.jsonl", examples[1])):
        if not (tmp_path / name).exists():
            shutil.copy(source, tmp_path / name)
    number = show(done).bundle.number
    evaluate(done / "final", benchmark=tmp_path, out=tmp_path / "e.json", max_new_tokens=4, cache=tmp_path / "cache")
    events = show(done).bundle.of_kind("evaluated")
    assert [event.event.content["record"] for event in events] == [number]
    assert verify([done]).valid
    other = tmp_path / "model"  # not the result of a run: nothing is recorded
    evaluate(other, benchmark=tmp_path, out=tmp_path / "e2.json", max_new_tokens=4, cache=tmp_path / "cache")
    assert len(show(done).bundle.of_kind("evaluated")) == 1


def test_a_log_needs_events_and_a_key(done: Path, tmp_path: Path) -> None:
    path = shutil.copy(done / "client" / "record.json", tmp_path / "record.json")
    with pytest.raises(RecordError, match=r"no identity\.key"):
        Log.existing(Path(path))
    (tmp_path / "record.json").write_bytes(Bundle([], []).to_bytes())
    with pytest.raises(RecordError, match="no valid events"):
        Log.existing(Path(path))


def test_an_update_of_another_publication_is_not_aggregated(save_tiny, tmp_path: Path, examples) -> None:
    """The client's signature is right, but it is for a copy that this server did not publish."""
    forget, retain = examples
    model = save_tiny()
    noise = without_offset(copies=1, kappa=0.0)
    copy = preprocess(model, state=tmp_path / "s", out=tmp_path / "c", perturbation=noise).copies[0]
    place = {"out": tmp_path / "u", "memory": tmp_path / "m"}
    update = unlearn(copy, forget=forget, retain=retain, training=QUICK, **place)
    event, client = event_of(update), Identity.at(tmp_path / "m" / "identity.key")
    assert event is not None
    elsewhere = replace(event.event, after=[f"sha256:{'0' * 64}"]).sign(client)
    (update / "event.json").write_bytes(file_bytes(elsewhere.envelope))
    assert event_of(update) == elsewhere
    with pytest.raises(UpdateError, match="not about copy 1 of round 1"):
        postprocess([update], state=tmp_path / "s", out=tmp_path / "o")
    (update / "event.json").write_bytes(file_bytes(event.envelope))
    postprocess([update], state=tmp_path / "s", out=tmp_path / "o")


def test_what_does_not_fit_the_record_is_noticed_before_training(
    save_tiny, tmp_path: Path, examples, monkeypatch
) -> None:
    forget, retain = examples
    model, options = save_tiny(), {"retain": retain, "memory": tmp_path / "m", "training": QUICK}
    first, second = (
        preprocess(
            model, state=tmp_path / name, out=tmp_path / f"c-{name}", perturbation=without_offset(copies=2)
        ).copies
        for name in ("a", "b")
    )
    unlearn(first[0], forget=forget, out=tmp_path / "u1", **options)
    monkeypatch.setattr(Client, "unlearn", lambda *_: pytest.fail("trained"))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(forget.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(StateError, match="has committed to another forget"):
        unlearn(first[1], forget=other, out=tmp_path / "u2", **options)
    with pytest.raises(RecordError, match="is the record of another run"):
        unlearn(second[1], forget=forget, out=tmp_path / "u2", **options)
    with pytest.raises(RecordError, match="expected the event of a published copy"):
        Recording(tmp_path / "x", {}).begin(event_of(tmp_path / "u1"))
