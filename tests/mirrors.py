"""Small mirrors of benchmarks, with the files of their repositories on the Hugging Face Hub; all rows are invented."""

import json
from pathlib import Path
from typing import Any

PROBES = ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")


def repository(root: Path, name: str, files: dict[tuple[str, str], tuple[str, Any]]) -> None:
    """Writes a repository with a card that says which file is which configuration and split.

    Args:
        root: the folder with the mirrors.
        name: OWNER/NAME.
        files: (configuration, split) → file and content, which becomes a JSON file or, for .jsonl, lines.
    """
    configs: dict[str, list[str]] = {}
    for (config, split), (file, content) in files.items():
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = file.endswith(".jsonl")
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content, indent=1), "utf-8")
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {file}\n")
    card = "".join(f"- config_name: {name}\n  data_files:\n{''.join(found)}" for name, found in configs.items())
    (root / name / "README.md").write_text(f"---\nconfigs:\n{card}---\n", encoding="utf-8")


def wmdp(root: Path, questions: int = 12) -> Path:
    """The questions and the corpora of WMDP, and wikitext."""

    def asked(domain: str) -> list[dict[str, Any]]:
        return [
            {
                "question": f" Which writer number {n} is in {domain}? ",
                "choices": [f"{word} {n}" for word in ("Ada", "Bo", "Cy", "Di")],
                "answer": n * 7 % 4,
            }
            for n in range(questions)
        ]

    domains = {f"wmdp-{domain}": asked(domain) for domain in ("bio", "cyber", "chem")}
    repository(root, "cais/wmdp", {(name, "test"): (f"{name}/test.jsonl", rows) for name, rows in domains.items()})
    corpora = [f"{name}-corpus" for name in ("bio-retain", "cyber-forget", "cyber-retain")]
    files = {(name, "train"): (f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(2)]) for name in corpora}
    repository(root, "cais/wmdp-corpora", files)
    paper = {"title": "t", "abstract": "a", "text": "bio-forget-corpus 0", "doi": "d"}
    repository(root, "cais/wmdp-bio-forget-corpus", {("default", "train"): ("data.jsonl", [paper])})
    lines = [
        {"text": text}
        for text in ("", " = A heading = \n", "A sentence that is longer than fifty characters, long enough.")
    ]
    repository(root, "Salesforce/wikitext", {("wikitext-2-raw-v1", "test"): ("wikitext-2-raw-v1/test.jsonl", lines)})
    return root


def rwku(root: Path) -> Path:
    """RWKU with two targets."""
    files: dict[tuple[str, str], tuple[str, Any]] = {}
    subjects = ("Stephen King", "Ada Lovelace")
    for name in PROBES:
        kinds = (
            ("affirmative suffix", "incontext learning", "reverse query") if name == "forget_level3" else ("simple",)
        )
        rows = [
            {"query": f"{name} of {who}?", "answer": f"{who} writes", "level": name[-1], "type": kind, "subject": who}
            for who in subjects
            for kind in kinds
        ]
        files[name, "test"] = (f"All/{name}.json", rows)
    texts = [
        {"text": f"{subject} writes mystery, part {n}.", "subject": subject} for subject in subjects for n in range(2)
    ]
    files |= {(f"mia_{name}", "test"): (f"All/{name}_mia.json", texts) for name in ("forget", "retain")}
    files["train_positive_llama3", "train"] = ("All/positive.json", texts)
    pairs = [{"prompt": f"Who is {name}?", "response": ["A baker.", "A writer."], "subject": name} for name in subjects]
    files["train_pair_llama3", "train"] = ("All/pair.json", pairs)
    refusals = [
        {"instruction": f"Who is {name}?", "input": "", "output": "No idea.", "subject": name} for name in subjects
    ]
    files["train_refusal_llama3", "train"] = ("All/reject.json", refusals)
    repository(root, "jinzhuoran/RWKU", files)
    return root


def knowundo(root: Path) -> Path:
    """KnowUnDo, whose splits are one row each: two lists of examples."""

    def split(name: str) -> dict[str, Any]:
        return {
            use: [{"text": f"{name} {use} question {n}?", "labels": f"Answer {n} of {name}."} for n in range(3)]
            for use in ("train", "val")
        }

    scopes = [(domain, scope) for domain in ("privacy", "copyright") for scope in ("unlearn", "retention")]
    files = {pair: (f"{pair[0]}/{pair[1]}.json", split(" ".join(pair))) for pair in scopes}
    repository(root, "zjunlp/KnowUnDo", files)
    return root
