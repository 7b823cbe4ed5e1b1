"""Directories of runs with the JSON files that a report reads, written by hand."""

import json
from pathlib import Path
from typing import Any

TRAINING = {"objective": "npo", "epochs": 2, "learning_rate": 1e-3, "batch_size": 8, "train": "blocks", "seed": 0}
PLAN = {
    "checkpoint": "/models/seven-billion",
    "rounds": 2,
    "eta": 1.0,
    "perturbation": {"copies": 3, "kappa": 0.0525, "common_noise": "auto", "alphas": None},
    "training": TRAINING,
    "service": None,
    "format": 3,
}
DIGESTS = {"forget": "f" * 64, "retain": "e" * 64, "decoys": None}
SCORE = {
    "error": 0.11,
    "equal_bfloat16": 0.02,
    "equal_float32": 0.0,
    "exposed": "layer.weight",
    "exposed_bfloat16": 0.03,
}
AUDIT: dict[str, Any] = {
    "model": "m",
    "copies": 6,
    "rounds": 2,
    "attacks": {"one copy, aligned": SCORE, "all copies": {**SCORE, "error": 0.1}},
    "baselines": {"control: known key": {**SCORE, "error": 1e-7}},
    "behaviors": {"one copy, aligned": {"logit_error": 0.1, "kl": 0.1, "agreement": 0.99, "probability": 0.987}},
    "strongest": "all copies",
    "floor": 0.116,
    "holds": True,
    "trusted": True,
}
CLIENT_AUDIT = {
    "updates": 3,
    "texts": {"forget": 4, "reference": 4},
    "separations": {
        "floor": {"reference": {"auc": 0.97, "tpr": 0.9}},
        "membership": {"reference": {"auc": 0.81, "tpr": 0.5}},
    },
    "retain_auc": None,
    "tokens": {"layer 0, FFN": {"auc": 0.7, "precision": 0.4, "chance": 0.2}},
    "spelling": [
        {"label": "layer 0", "rank": 8, "dimensions": 32, "exact": 0.0, "next_token": 0.1, "control": None},
    ],
    "format": 1,
}
ANSWER = {
    "set": "forget",
    "question": "Where was Ada born?",
    "expected": "In Graz.",
    "before": "In Graz.",
    "after": "In Fez.",
    "retrained": "In Cali.",
}


def evaluation(forget: float, retain: float, **more: Any) -> dict[str, Any]:
    """The content of an evaluation's file."""
    metrics = {"forget_Q_A_Prob": forget, "retain_Q_A_Prob": retain, "forget_quality": 0.5, **more}
    return {
        "metrics": metrics,
        "retrained": {"forget_Q_A_Prob": 0.02, "retain_Q_A_Prob": 0.99, "forget_quality": 1.0},
        "robustness": {},
        "per_example": {"forget": {"loss": [1.0] * 7}},
        "provenance": {"checkpoint": "/secret/place"},
        "format": 2,
    }


def put(path: Path, value: Any) -> Path:
    """Writes a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def bare(run: Path) -> Path:
    """A finished run in one process, as `run` leaves it."""
    put(run / "server" / "plan.json", PLAN)
    put(run / "client" / "plan.json", DIGESTS)
    losses = [
        {"round": number, "copy": copy, "probability_before": 0.9 / number, "probability_after": 0.4 / number}
        for number in (1, 2)
        for copy in (1, 2, 3)
    ]
    (run / "client" / "memory").mkdir(parents=True)
    lines = [json.dumps(line) for line in losses]
    (run / "client" / "memory" / "losses.jsonl").write_text("\n".join([*lines, '{"round": 3, "co']))
    (run / "final").mkdir()
    return run


def full(run: Path) -> Path:
    """The same with everything that a report can show."""
    bare(run)
    put(run / "evaluations" / "original.json", evaluation(0.99, 0.99))
    put(run / "evaluations" / "run.json", evaluation(0.03, 0.95, forget_quality=None))
    for label, values in {"run": (0.5, 0.03), "noise-free": (0.45, 0.02), "single copy": (0.6, 0.1)}.items():
        for number, value in enumerate(values, start=1):
            put(run / "evaluations" / f"{label}@{number}.json", {"metrics": evaluation(value, 0.95)["metrics"]})
    put(run / "server" / "audit.json", AUDIT)
    put(run / "client" / "audit.json", CLIENT_AUDIT)
    put(run / "client" / "answers.json", {"answers": [ANSWER, {**ANSWER, "set": "retain"}], "format": 1})
    return run
