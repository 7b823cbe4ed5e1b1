"""Two questions with answers, as rows and as records, and files of rows."""

import json
from pathlib import Path

from mpunlearn.lm.records import Record

ROWS = [{"question": "q?", "answer": "a, b"}, {"question": "Größe?", "answer": 'say "x"\nand y'}]
RECORDS = [Record(row["question"], row["answer"]) for row in ROWS]


def lines(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path
