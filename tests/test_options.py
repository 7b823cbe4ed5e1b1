"""The options of the verbs: their help, their types, and configuration files."""

import dataclasses
from pathlib import Path
from typing import Any

import pydantic  # noqa: F401  cyclopts checks more once it is imported
import pytest
import yaml

from mpunlearn.cli import VERBS
from mpunlearn.options import ParseError, parse
from mpunlearn.protocol.objectives import OBJECTIVES
from mpunlearn.protocol.plan import Training
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.signatures import GENERAL, General, options_of
from mpunlearn.signatures import REQUIRED as NO_DEFAULT

REQUIRED = {
    "preprocess": ["m", "--state", "s", "--out", "o"],
    "postprocess": ["u", "v", "--state", "s", "--out", "o"],
    "calibrate": ["m", "--calibration-text", "t"],
    "describe": ["m"],
    "audit": [],
    "extract": ["m", "n", "--forget", "f", "--reference", "t"],
    "server start": ["m", "--run", "r"],
    "server resume": ["r"],
    "server status": ["r"],
    "unlearn": ["m", "--forget", "f", "--out", "o"],
    "client audit": ["u", "v", "--copy", "c", "d", "--forget", "f"],
    "client review": ["c"],
    "client key": [],
    "client join": ["i"],
    "client work": ["--spool", "s", "--policy", "p", "--forget", "f"],
    "forget": ["m", "--forget", "f", "--out", "o"],
    "run": ["m", "--forget", "f", "--out", "o"],
    "evaluate": ["m"],
    "record show": ["r"],
    "record verify": ["r", "s"],
    "record merge": ["r", "s", "--out", "o"],
    "record open": ["c", "--out", "o"],
    "record add": ["r", "replicated"],
    "report": ["r"],
    "plan": ["m", "--forget", "f"],
    "ask": ["m", "n"],
    "push": ["r", "o/n"],
    "doctor": [],
    "demo": [],
    "network-demo": [],
    "example": ["o"],
}


def given(verb: str, *arguments: str) -> dict[str, Any]:
    """The keyword arguments that a verb's function gets."""
    parsed = parse(f"mpunlearn {verb}", VERBS[verb].function(verb), [*REQUIRED[verb], *arguments])
    assert parsed is not None
    return parsed[0]


def test_every_option_reaches_its_function() -> None:
    arguments = given(
        "run",
        *"--rounds 7 --eta 0.5 --base b --keep-exchange --copies 4 --kappa 0.2 --noise-scope layers --denoising extrapolate "
        "--publish-dtype bfloat16 --reparameterization paper --alphas 1,1.5,2,-1 --objective grad-diff --gamma 2 --seed 3 "
        "--train all --gradient-checkpointing --question-key q".split(),
    )
    assert [str(arguments[name]) for name in ("checkpoint", "forget", "out", "base")] == ["m", "f", "o", "b"]
    assert (arguments["rounds"], arguments["eta"], arguments["keep_exchange"], arguments["retain"]) == (
        7,
        0.5,
        True,
        None,
    )
    assert arguments["perturbation"] == Perturbation(
        copies=4, kappa=0.2, noise_scope="layers", denoising="extrapolate", publish_dtype="bfloat16",
        reparameterization="paper", alphas=(1.0, 1.5, 2.0, -1.0),
    )  # fmt: skip
    assert arguments["training"] == Training("grad-diff", gamma=2.0, seed=3, train="all")
    assert arguments["resources"].gradient_checkpointing is True
    assert arguments["data"].question_key == "q"


def test_a_list_is_given_at_once_or_one_by_one() -> None:
    arguments = given("client audit", "--require", "spelling<0.1")
    assert [list(map(str, arguments[name])) for name in ("updates", "copy")] == [["u", "v"], ["c", "d"]]
    parsed = parse("x", VERBS["client audit"].function("client audit"), "u v --copy c --copy d --forget f".split())
    assert parsed is not None
    assert parsed[0] == {**arguments, "require": None}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_given_means_the_functions_own_defaults(verb: str) -> None:
    arguments = given(verb)
    for option in options_of(VERBS[verb].function(verb)):
        if option.name in arguments and option.default is not NO_DEFAULT:
            assert arguments[option.name] == option.default, option.name
    for name, kind in (("training", Training), ("perturbation", Perturbation)):
        if name in arguments:
            assert arguments[name] == kind()


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_sentence(verb: str) -> None:
    for option in options_of(VERBS[verb].function(verb)):
        assert option.help[:1].isupper() or not option.help[:1].isalpha(), (option.name, option.help)
        assert len(option.help.split()) >= 2, option.name
        assert option.help.rstrip(")").endswith("."), (option.name, option.help)


@pytest.mark.parametrize("verb", VERBS)
def test_a_printed_configuration_is_read_again(verb: str, tmp_path: Path, capsys) -> None:
    function = VERBS[verb].function(verb)
    extra = (
        ["--objective", "dpo", "--beta", "0.3", "--learning-rate", "1e-5"]
        if verb in ("run", "unlearn", "server start")
        else []
    )
    extra += ["--alphas", "1,2,3"] if verb in ("run", "preprocess") else []
    assert parse("x", function, [*REQUIRED[verb], *extra, "--print-config"]) is None
    file = tmp_path / "options.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse("x", function, ["--config", str(file)]) == parse(
        "x", function, [*REQUIRED[verb], *extra, "--config", str(file)]
    )
    first, second = parse("x", function, ["--config", str(file)]), parse("x", function, [*REQUIRED[verb], *extra])
    assert first is not None
    assert second is not None
    assert first[0] == second[0]


def test_configurations_can_be_printed_without_the_required_options(capsys) -> None:
    assert parse("x", VERBS["run"].function("run"), ["--print-config"]) is None
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["rounds"] == 5
    assert printed["objective"] == "npo"
    assert "forget" not in printed


def test_the_command_line_counts_more_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rounds: 7\nlearning_rate: 1e-4\nkeep-exchange: true\nalphas: 1,2,3\n")
    arguments = given("run", "--config", str(tmp_path / "c.yaml"), "--rounds", "9", "--no-keep-exchange")
    assert (arguments["rounds"], arguments["keep_exchange"]) == (9, False)
    assert arguments["training"].learning_rate == 1e-4
    assert arguments["perturbation"].alphas == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("round: 7\n", "unknown option 'round'; did you mean rounds?"),
        ("rounds: many\n", "--rounds: expected an integer, found 'many'"),
        ("objective: npoo\n", "--objective: expected one of grad-ascent"),
        ("keep_exchange: 1\n", "--keep-exchange: expected true or false, found 1"),
        ("- rounds\n", "expected lines such as `rounds: 5`"),
        ("rounds: [\n", "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_is_named(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ParseError) as caught:
        given("run", "--config", str(tmp_path / "c.yaml"))
    assert why in str(caught.value)
    assert "c.yaml" in str(caught.value)


def test_underscores_and_hyphens_are_alike() -> None:
    assert given("run", "--learning_rate", "1e-3") == given("run", "--learning-rate", "1e-3")


def test_help_lists_choices_defaults_and_groups(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert parse("mpunlearn run", VERBS["run"].function("run"), ["--help"]) is None
    text = capsys.readouterr().out
    for word in (
        *OBJECTIVES,
        "Main options",
        "Noise and reparameterization",
        "Training",
        "Hyperparameters of the objectives",
    ):
        assert word in text
    assert "default: 5" in text
    assert text.index("Training") < text.index("Hyperparameters of the objectives") < text.index("General")
    assert "None" not in text


def test_general_options_are_not_given_to_the_function() -> None:
    names = {field.name for field in dataclasses.fields(General)}
    assert names == {option.name for option in options_of(VERBS["demo"].function("demo")) if option.group == GENERAL}
    for verb in VERBS:
        assert not names & set(given(verb))


def test_a_preset_gives_way_to_single_options(tmp_path: Path, capsys) -> None:
    lean = given("run", "--preset", "lean")
    assert (lean["rounds"], lean["training"].epochs) == (1, 10)
    assert lean["perturbation"] == Perturbation(copies=1, kappa=0.0, common_noise="auto")
    (tmp_path / "run.yaml").write_text("preset: hardened\nkappa: 0.2\nrounds: 3\n")
    mixed = given("run", "--config", str(tmp_path / "run.yaml"), "--rounds", "4")
    assert (mixed["rounds"], mixed["perturbation"].kappa, mixed["perturbation"].common_noise) == (4, 0.2, "auto")
    assert given("preprocess", "--preset=hardened")["perturbation"].common_noise == "auto"
    assert parse("mpunlearn run", VERBS["run"].function("run"), ["--preset", "lean", "--print-config"]) is None
    printed = capsys.readouterr().out
    assert "common_noise: auto\n" in printed
    assert "preset" not in printed
    with pytest.raises(ParseError, match="hardened"):
        given("run", "--preset", "soft")


@pytest.mark.parametrize("verb", ["run", "server start"])
def test_the_default_is_hardened_and_a_compartment_needs_its_stand_in(verb: str) -> None:
    assert given(verb) == given(verb, "--preset", "hardened")
    with pytest.raises(ParseError, match="--preset compartment: needs --stand-in: A checkpoint"):
        given(verb, "--preset", "compartment")
    compartment = given(verb, "--preset=compartment", "--stand-in=s")
    assert compartment == {**given(verb), "stand_in": Path("s")}


def test_every_preset_names_options() -> None:
    from mpunlearn.presets import PRESETS

    names = {option.name for option in options_of(VERBS["run"].function("run"))}
    assert all(set(values) <= names for values in PRESETS.values())


def test_values_for_the_chat_template_are_given_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ("--template-kwargs", "date_string=10 Apr 2025", "--template-kwargs=enable_thinking=false")
    values = {"date_string": "10 Apr 2025", "enable_thinking": False}
    assert given("unlearn", *pairs, "--system-prompt", "Be kind.")["data"].template_kwargs == values
    assert given("evaluate", *pairs)["template_kwargs"] == values
    assert given("unlearn")["data"].template_kwargs is None
    assert parse("mpunlearn evaluate", VERBS["evaluate"].function("evaluate"), ["m", *pairs, "--print-config"]) is None
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["template_kwargs"] == values
    file = tmp_path / "options.yaml"
    for text in (printed, "template-kwargs: [date_string=10 Apr 2025, enable_thinking=false]"):
        file.write_text(text)
        assert given("evaluate", "--config", str(file))["template_kwargs"] == values
    with pytest.raises(ParseError, match="--template-kwargs: expected KEY=VALUE, such as date_string=today, found 'x'"):
        given("evaluate", "--template-kwargs", "x")
    file.write_text("template-kwargs: 10 Apr 2025")
    with pytest.raises(ParseError, match="--template-kwargs: expected"):
        given("evaluate", "--config", str(file))
