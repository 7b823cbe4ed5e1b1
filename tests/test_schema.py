"""JSON in, a checked dataclass out."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.errors import FileError, PlanError, SchemaError
from mpunlearn.schema import MAX_INTEGER, check_options, older, parse, read, write


@dataclass(frozen=True)
class Inner:
    number: int
    text: str = "x"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["a", "b"] = "a"
    share: float | None = None
    pair: tuple[float, ...] | None = None
    inners: list[Inner] = field(default_factory=list)
    named: dict[str, Inner] = field(default_factory=dict)
    on: bool = False
    anything: Any = None
    format: int = 2


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
inners = st.builds(Inner, st.integers(-MAX_INTEGER, MAX_INTEGER), texts)
finite = st.floats(allow_nan=False, allow_infinity=False)
outers = st.builds(
    Outer,
    inners,
    st.sampled_from(["a", "b"]),
    st.none() | finite,
    st.none() | st.lists(finite, max_size=3).map(tuple),
    st.lists(inners, max_size=3),
    st.dictionaries(texts, inners, max_size=3),
    st.booleans(),
)


@given(outers)
def test_what_is_written_is_read(outer: Outer) -> None:
    assert parse(Outer, json.loads(json.dumps(dataclasses.asdict(outer)))) == outer


scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner))


@given(values)
def test_anything_else_is_refused_and_nothing_worse(value: Any) -> None:
    for candidate in (value, {"inner": value}, {"inner": {"number": 1}, "pair": value, "named": value}):
        try:
            outer = parse(Outer, candidate)
        except SchemaError:
            continue
        assert isinstance(outer.inner, Inner)
        assert outer.pair is None or all(type(number) is float and math.isfinite(number) for number in outer.pair)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "expected the fields of Outer, found []"),
        ({}, "Outer: missing field 'inner'"),
        ({"inner": {"number": 1}, "colour": 1}, "Outer: unknown field 'colour'"),
        ({"inner": {"number": "1"}}, "Inner.number: expected an integer, found '1'"),
        ({"inner": {"number": True}}, "Inner.number: expected an integer, found True"),
        ({"inner": {"number": 1.5}}, "Inner.number: expected an integer, found 1.5"),
        ({"inner": {"number": 1 << 60}}, f"Inner.number: expected an integer of at most {MAX_INTEGER}"),
        ({"inner": {"number": 1}, "share": float("nan")}, "Outer.share: expected a finite number, found nan"),
        ({"inner": {"number": 1}, "share": 10**400}, "Outer.share: expected a finite number"),
        ({"inner": {"number": 1}, "kind": "c"}, "Outer.kind: expected one of a, b, found 'c'"),
        ({"inner": {"number": 1}, "kind": []}, "Outer.kind: expected one of a, b"),
        ({"inner": {"number": 1}, "on": 1}, "Outer.on: expected true or false, found 1"),
        ({"inner": {"number": 1}, "named": {"x": {}}}, "Inner: missing field 'number'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(value: Any, why: str) -> None:
    with pytest.raises(SchemaError) as caught:
        parse(Outer, value)
    assert why in str(caught.value)


def test_files_of_older_and_newer_formats(tmp_path: Path) -> None:
    outer = Outer(Inner(1))
    write(tmp_path / "file.json", outer)
    assert read(Outer, tmp_path / "file.json") == outer
    (tmp_path / "old.json").write_text('{"number": 1}')
    upgrade = lambda value: value if "inner" in value else {"inner": value}  # noqa: E731
    assert read(Outer, tmp_path / "old.json", upgrade) == outer
    (tmp_path / "new.json").write_text('{"format": 3, "number": 1}')
    with pytest.raises(SchemaError, match="new.json: has format 3, expected at most 2; upgrade mpunlearn"):
        read(Outer, tmp_path / "new.json")
    with pytest.raises(FileError, match="no.json"):
        read(Outer, tmp_path / "no.json")


def test_options_are_named_as_on_the_command_line() -> None:
    @dataclass(frozen=True)
    class Options:
        some_share: float = 0.5

        def __post_init__(self) -> None:
            check_options(self)

    assert type(Options(1).some_share) is float
    with pytest.raises(PlanError, match="--some-share: expected a number, found 'x'"):
        Options("x")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Extended:
    """Something whose older versions always did what is now off by default."""

    name: str
    thorough: bool = older(absent=True, default=False)


def test_a_field_that_was_added_later_can_stand_for_something_else_in_older_files(tmp_path: Path) -> None:
    assert Extended("new") == parse(Extended, {"name": "new", "thorough": False})
    assert parse(Extended, {"name": "old"}) == Extended("old", thorough=True)
    write(tmp_path / "x.json", Extended("new"))
    assert read(Extended, tmp_path / "x.json") == Extended("new")
