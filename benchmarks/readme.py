"""Updates the table of demo results in README.md: mean and standard deviation over seeds.

Every seed has its own fictitious world, models and batch order, and every run has its own secrets. The table replaces
the text between two markers in the README, so the numbers there are always measured ones.

    python benchmarks/readme.py [--seeds 5] [--readme README.md]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from mpunlearn.demo.local import DemoResult, demo
from mpunlearn.demo.table import HEADER, Line
from mpunlearn.tables import markdown

BEGIN, END = "<!-- benchmarks/readme.py writes this table -->\n", "<!-- end of the table -->\n"


def results(seeds: int) -> list[DemoResult]:
    """Runs the demo once per seed."""
    done = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            done.append(demo(out=Path(folder) / "demo", seed=seed))
        print(f"seed {seed}\n{done[-1].text()}\n", flush=True)
    return done


def table(demos: list[DemoResult]) -> str:
    """One row per model: mean ± standard deviation of each score over seeds, and the means of the last two columns."""
    rows = []
    for lines in zip(*(result.models for result in demos), strict=True):
        seconds = [line.seconds for line in lines if line.seconds is not None]
        left = [line.left for line in lines if line.left is not None]
        cells = [spread(values) for values in zip(*map(numbers, lines), strict=True)]
        cells += [f"{statistics.mean(left):.2g}" if left else "", f"{statistics.mean(seconds):.1f}" if seconds else ""]
        rows.append([lines[0].model, *cells])
    return markdown(HEADER, rows)


def numbers(line: Line) -> tuple[float, float, float, float]:
    """The four scores of a line."""
    return line.forget.probability, line.forget.rouge_l, line.retain.probability, line.retain.rouge_l


def spread(values: tuple[float, ...]) -> str:
    """Formats mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def write(readme: Path, text: str) -> None:
    """Replaces the text between the markers.

    Raises:
        SystemExit: a marker is missing.
    """
    content = readme.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{readme}: expected the lines {BEGIN.strip()!r} and {END.strip()!r} around the table")
    readme.write_text(f"{before}{BEGIN}{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Runs the demos and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--readme", type=Path, default=Path(__file__).parents[1] / "README.md")
    arguments = parser.parse_args()
    text = table(results(arguments.seeds))
    write(arguments.readme, text)
    print(text)


if __name__ == "__main__":
    main()
