"""What `import mpunlearn` offers to people, editors and type checkers."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import mpunlearn


def test_every_name_is_there_and_listed() -> None:
    for name in mpunlearn.__all__:
        assert getattr(mpunlearn, name) is not None
    assert set(mpunlearn.__all__) <= set(dir(mpunlearn))
    assert mpunlearn.__version__ == importlib.metadata.version("mpunlearn")
    assert callable(mpunlearn.run)
    with pytest.raises(AttributeError, match="runn"):
        getattr(mpunlearn, "runn")  # noqa: B009


def test_importing_is_light() -> None:
    script = "import sys, mpunlearn; sys.exit(', '.join({'torch', 'numpy', 'transformers'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_type_checker_sees_the_signatures(tmp_path: Path) -> None:
    """As for a user of the installed package, outside of this repository and its configuration."""
    lines = {
        "run(1, 2, nonsense=3)": 'Unexpected keyword argument "nonsense"',
        'Training(objective="npoo")': "expected",
        "Perturbation(copies=None)": "expected",
        "from mpunlearn import runn": "has no attribute",
        'reveal_type(run("model", forget="f", out="o"))': 'Revealed type is "pathlib.Path"',
        'reveal_type(forget("model", forget=["text"], out="o"))': 'Revealed type is "pathlib.Path"',
        'reveal_type(forget(object(), tokenizer=object(), forget=["text"]))': 'Revealed type is "Any"',
        'reveal_type(evaluate("model").metrics["forget_Q_A_Prob"])': 'Revealed type is "float"',
    }
    file = tmp_path / "user.py"
    fine = (
        "from mpunlearn import Perturbation, Training, evaluate, forget, run\n\n"
        'run("m", forget="f", out="o", training=Training("npo", epochs=3), perturbation=Perturbation(copies=2))\n'
    )
    file.write_text(fine + "".join(f"{line}\n" for line in lines))
    config = tmp_path / "mypy.ini"
    skipped = (
        "torch.*,transformers.*,numpy.*,scipy.*,datasets.*,peft.*,accelerate.*,tokenizers.*,safetensors.*,pyarrow.*"
    )
    config.write_text(
        f"[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n[mypy-{skipped}]\nfollow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path), str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    messages = {
        int(line.split(":")[1]): line for line in reversed(done.stdout.splitlines()) if line.startswith("user.py:")
    }
    assert set(messages) == set(range(4, 4 + len(lines))), done.stdout
    for number, (line, expected) in enumerate(lines.items(), start=4):
        assert expected in messages[number], (line, messages[number])
