"""What is fuzzed: each target parses bytes as one kind of file or message.

A target may refuse its input with an `MPUError`. Anything else that it raises is a finding, and so are crashes, hangs and
excessive memory, which libFuzzer reports.
"""

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tests.conftest import tiny_model

from mpunlearn.architecture import Architecture
from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.client.network.pins import Pins
from mpunlearn.client.network.policy import Policy
from mpunlearn.errors import MPUError
from mpunlearn.lm.examples import encode
from mpunlearn.lm.model import load_tokenizer
from mpunlearn.lm.records import read_records
from mpunlearn.lm.sources import Data
from mpunlearn.protocol.exchange import ReceivedUpdate
from mpunlearn.protocol.identity import Identity
from mpunlearn.protocol.messages import Finished, Job, Result, Sealed, seal
from mpunlearn.protocol.plan import Training
from mpunlearn.protocol.record.artifacts import FileDigest
from mpunlearn.protocol.record.bundle import Bundle
from mpunlearn.protocol.record.canonical import file_bytes
from mpunlearn.protocol.record.commitments import Commitments, Leaf
from mpunlearn.protocol.record.events import Event, SignedEvent, parse_statement
from mpunlearn.protocol.record.log import read_event
from mpunlearn.server.plan import RunPlan

_TEMPORARY = tempfile.TemporaryDirectory(prefix="mpunlearn-fuzz-")
FOLDER = Path(_TEMPORARY.name)
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [],
    }
)
MODELS = ("llama", "gemma2", "phi3", "gpt_neox", "qwen3_moe")


@dataclass(frozen=True)
class Target:
    """A parser, and inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: list[bytes]

    def __call__(self, data: bytes) -> None:
        """Parses the input; raises whatever is a finding."""
        with suppress(MPUError):
            self.run(data)


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _message(data: bytes) -> None:
    """The body of a message, correctly signed."""
    body = data.decode(errors="replace")
    header = json.dumps({"body": body, "key": IDENTITY.public, "signature": IDENTITY.sign(body)}).encode()
    sealed = Sealed.open(
        b"".join([seal(Finished("0" * 32, "complete"), IDENTITY)[:4], len(header).to_bytes(4, "little"), header])
    )
    if hasattr(sealed.message, "files"):
        sealed.payloads()
    if isinstance(sealed.message, Job):
        Policy(IDENTITY.public).violations(sealed.message)


def _envelope(data: bytes) -> None:
    Sealed.open(data)


def _checkpoint(data: bytes) -> None:
    """The file of a checkpoint's weights."""
    folder = _file("weights/model.safetensors", data).parent
    tensors = TensorDirectory(folder)
    for name in list(tensors.tensors)[:4]:
        tensors.read(name)


def _index(data: bytes) -> None:
    """The index of a checkpoint's shards."""
    (folder := FOLDER / "index").mkdir(exist_ok=True)
    (folder / "model-1.safetensors").write_bytes(WEIGHTS)
    tensors = TensorDirectory(_file("index/model.safetensors.index.json", data).parent)
    for name in list(tensors.tensors)[:4]:
        tensors.read(name)


def _config(data: bytes) -> None:
    """config.json, beside the weights of a model."""
    folder = _file("config/config.json", data).parent
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "tokenizer.json").write_text(TOKENIZER)
    checkpoint = Checkpoint(folder)
    Architecture.of(checkpoint).tensor_roles(checkpoint)
    Pins.of(folder)


def _update(data: bytes) -> None:
    """update.json, beside the tensors of an update."""
    folder = _file("update/update.json", data).parent
    (folder / "update.safetensors").write_bytes(WEIGHTS)
    ReceivedUpdate.open(folder)


def _plan(data: bytes) -> None:
    RunPlan.read(_file("plan.json", data))


def _event(data: bytes) -> None:
    read_event(_file("event.json", data))


def _statement(data: bytes) -> None:
    """What an event says, as if the signature were valid; and what follows from it."""
    event = parse_statement(data)
    bundle = Bundle([SignedEvent(event, {})], [])
    assert bundle.to_bytes()
    assert bundle.state()


def _commitments(data: bytes) -> None:
    assert all(len(root) == 64 for root in Commitments.read(_file("commitments.json", data)).roots().values())


def _policy(data: bytes) -> None:
    Policy.read(_file("policy.toml", data))


def _records(data: bytes) -> None:
    """A file of examples. The first byte says which kind."""
    kinds = ("jsonl", "json", "csv", "txt", "parquet", "jsonl.gz")
    kind = kinds[data[0] % len(kinds)] if data else "txt"
    read_records(_file(f"data.{kind}", data[1:]), Data())


def _tokenizer(data: bytes) -> None:
    """tokenizer.json, and what becomes of a text."""
    folder = _file("tokenizer/tokenizer.json", data).parent
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    encode(RECORDS, load_tokenizer(folder), 64)


def _template(data: bytes) -> None:
    """A chat template, and what becomes of a conversation."""
    folder = _file("template/chat_template.jinja", data).parent
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "tokenizer.json").write_text(TOKENIZER)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    encode(RECORDS, load_tokenizer(folder), 64)


def _parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pa.table({"question": ["a b"], "answer": ["b"]}), out)
    return out.getvalue()


IDENTITY = Identity.at(FOLDER / "identity.key")
CONFIGS: dict[str, dict[str, Any]] = {}
for _name in MODELS:
    _model = tiny_model(
        _name, torch.float32, **({"num_experts": 2, "moe_intermediate_size": 8} if "moe" in _name else {})
    )
    CONFIGS[_name] = json.loads(_model.config.to_json_string(use_diff=False))
    if _name == "llama":
        WEIGHTS = save({name: tensor.contiguous() for name, tensor in _model.state_dict().items()})
_JOB = Job(
    run="0" * 32,
    client=IDENTITY.public,
    round=1,
    rounds=2,
    copy=1,
    copies=3,
    training={**asdict(Training()), "parameters": {}},
    files=[],
)
_LINE = b'{"question": "a b", "answer": "b"}\n'
RECORDS = read_records(_file("questions.jsonl", _LINE), Data())
_POLICY = f"""server_key = "{IDENTITY.public}"
max_rounds = 5
stores = ["s3://b"]
[plan]
max_learning_rate = 1e-3
[audit]
require = ["spelling<0.1"]
"""
EVENT = Event(
    kind="updated",
    run="0" * 32,
    server="1" * 64,
    signer=IDENTITY.public,
    created_at="2026-11-25T12:00:00Z",
    after=[f"sha256:{'2' * 64}"],
    content={"round": 1, "copy": 1, "commitments": {"forget": "3" * 64}},
    files=[FileDigest("update.json", "4" * 64)],
).sign(IDENTITY)
TARGETS = {
    "message": Target(
        _message,
        [
            json.dumps(asdict(message)).encode()
            for message in (_JOB, Result("0" * 32, "1" * 64, refusal="no"), Finished("0" * 32, "complete"))
        ],
    ),
    "envelope": Target(_envelope, [seal(Finished("0" * 32, "complete"), IDENTITY)]),
    "checkpoint": Target(_checkpoint, [save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})]),
    "index": Target(
        _index, [json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}).encode(), b'{"metadata": {}}']
    ),
    "config": Target(_config, [json.dumps(config).encode() for config in CONFIGS.values()]),
    "update": Target(
        _update,
        [json.dumps({"format": 1, "mpunlearn": {"run": "0" * 32, "round": 1, "copy": 1, "copies": 3}}).encode()],
    ),
    "plan": Target(_plan, [json.dumps(asdict(RunPlan("model"))).encode()]),
    "event": Target(_event, [file_bytes(EVENT.envelope)]),
    "statement": Target(_statement, [EVENT.event.statement()]),
    "commitments": Target(_commitments, [Commitments({"forget": [Leaf("0" * 64, "1" * 64)] * 3}).to_bytes()]),
    "policy": Target(_policy, [_POLICY.encode()]),
    "records": Target(
        _records,
        [
            b"\0" + _LINE,
            b"\1[" + _LINE + b"]",
            b"\2question,answer\na b,b\n",
            b"\3a b\n",
            b"\4" + _parquet(),
            b"\5" + gzip.compress(_LINE),
        ],
    ),
    "tokenizer": Target(_tokenizer, [TOKENIZER.encode()]),
    "template": Target(_template, [b"{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"]),
}
"""Name → target."""
