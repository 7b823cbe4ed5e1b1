"""Writes policy.toml: every limit as a line, with its reason in a comment above it.

An existing file is kept as it is, except for the tables that are written anew. Not covered: the comments of a table that
is written anew.
"""

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.pins import ModelPolicy
from mpunlearn.client.network.policy import Policy
from mpunlearn.client.network.process import ProcessLimits
from mpunlearn.client.plausibility.report import Limits
from mpunlearn.schema import explanation

WIDTH = 110
HEAD = """\
# The data owner's limits on what the server may ask for. A job that exceeds one is refused. All lines are optional except
# for server_key. The model is the server's: what it makes the training reveal is limited by these lines and by averaging
# over clients, and by nothing else.
"""
AUDIT = """\
# [audit]                        # measure every update before it is sent (docs/client-audit.md)
# require = ["spelling<0.1"]
"""


def new_policy(server_key: str, model: ModelPolicy, limits: Limits) -> str:
    """The text of a new policy.toml.

    Args:
        server_key: the server's public key.
        model: what the model is.
        limits: what a copy has to look like.
    """
    policy = Policy(server_key)
    names = ("server_key", "max_copies", "max_rounds", "max_epochs", "max_megabytes", "token_local", "review")
    top = "".join(f"{name} = {_value(getattr(policy, name))}\n" for name in names)
    tables = {"model": model, "plan": PlanBounds(), "plausibility": limits, "process": ProcessLimits()}
    return "\n".join([HEAD + top, *(_table(name, content) for name, content in tables.items()), AUDIT])


def with_tables(text: str, tables: Mapping[str, Any]) -> str:
    """The text of a policy.toml in which some tables are written anew.

    Args:
        text: the text of the file.
        tables: name → dataclass.
    """
    for name, content in tables.items():
        text = re.sub(rf"(?ms)^\[{name}\][^\n]*\n.*?(?=^\[|\Z)", "", text)
        text = f"{text.rstrip()}\n\n{_table(name, content)}"
    return text


def _table(name: str, content: Any) -> str:
    """A table; a field that is None is a comment, since TOML has no such value."""
    lines, values = [f"[{name}]"], asdict(content)
    for item in sorted(fields(content), key=lambda item: item.name != "base"):
        lines += textwrap.wrap(explanation(item), WIDTH, initial_indent="# ", subsequent_indent="# ")
        value = values[item.name]
        lines.append(f"# {item.name} =" if value is None else f"{item.name} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A value in TOML, which writes strings, numbers, booleans and lists as JSON does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
