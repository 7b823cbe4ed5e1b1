"""The courier: it carries what was asked for, again if it was lost, and nothing else."""

from pathlib import Path


def test_the_courier_takes_what_it_asked_for_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    from mpunlearn.protocol.flower.courier import mail as module

    mail, name = module.Mail(tmp_path), "a" * 64
    (tmp_path / "outbox" / "1").mkdir(parents=True)
    (tmp_path / "inbox").mkdir()
    (tmp_path / "outbox" / "1" / name).write_bytes(b"job")
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 10)
    for record in (
        {},
        {"names": name, "results": [b"x"], "missing": []},
        {"names": [name], "results": ["text"], "missing": []},
        {"names": [name], "results": [b"x" * 11], "missing": []},
        {"names": ["../../escaped"], "results": [b"x"], "missing": []},
        {"names": ["b" * 64], "results": [b"x"], "missing": []},
    ):
        mail.unload("1", record)
        assert not list((tmp_path / "inbox").iterdir())
    mail.unload("1", {"names": [name], "results": [b"x"], "missing": []})
    assert [file.name for file in (tmp_path / "inbox").iterdir()] == [f"1-{name}"]


def test_a_job_that_was_lost_on_the_way_is_delivered_again(tmp_path: Path) -> None:
    from mpunlearn.protocol.flower.courier.mail import Mail

    mail, name = Mail(tmp_path), "a" * 64
    (tmp_path / "outbox" / "1").mkdir(parents=True)
    (tmp_path / "outbox" / "1" / name).write_bytes(b"job")
    record = mail.load("1")
    assert record is not None
    assert record["jobs"] == [b"job"]
    again = mail.load("1")
    assert again is not None
    assert again["jobs"] == []  # on its way
    mail.unload("1", {"names": [], "results": [], "missing": [name]})
    last = mail.load("1")
    assert last is not None
    assert last["jobs"] == [b"job"]
