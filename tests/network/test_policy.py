"""The policy file, as the documentation shows it and as it should not be."""

import re
from pathlib import Path

import pytest

from mpunlearn.client.network.policy import Policy
from mpunlearn.errors import PlanError

KEY = "ab" * 32


def test_the_documented_policy_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "network.md").read_text(encoding="utf-8")
    example = re.search(r"```toml\n(.*?)```", text, re.S)
    assert example is not None
    (tmp_path / "policy.toml").write_text(example[1].replace("…", KEY, 1), encoding="utf-8")
    policy = Policy.read(tmp_path / "policy.toml")
    assert policy.server_key == KEY
    assert policy.audit is not None
    defaults = Policy(KEY)
    for name in ("max_copies", "max_rounds", "max_epochs", "max_megabytes"):
        assert getattr(policy, name) == getattr(defaults, name)
    for name in ("plan", "plausibility", "process", "review", "model"):
        assert getattr(policy, name) == getattr(defaults, name)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "missing field 'server_key'"),
        ('server_key = "short"', "64 hexadecimal digits"),
        (f'server_key = "{KEY}"\nmax_round = 3', "unknown field 'max_round'"),
        (f'server_key = "{KEY}"\nmax_rounds = "3"', "expected an integer"),
        (f'server_key = "{KEY}"\nmax_rounds = 0', "above 0"),
        (f'server_key = "{KEY}"\nobjectives = "npo"', "expected list"),
        ("server_key = ", "cannot be read"),
        (f'server_key = "{KEY}"\n[audit]\nreference = "known.jsonl"', "AuditPolicy: missing field 'require'"),
        (f'server_key = "{KEY}"\n[audit]\nrequire = []', "policy: audit: require: expected name<number"),
        (f'server_key = "{KEY}"\n[audit]\nrequire = ["auc<0.7"]', "policy: audit: require: unknown: auc; known"),
    ],
)
def test_a_policy_with_a_mistake_is_none(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(PlanError, match=why):
        Policy.read(tmp_path / "policy.toml")
