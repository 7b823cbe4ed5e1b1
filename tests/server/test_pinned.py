"""What Pre-Process publishes and Post-Process makes of it, to the byte, for a fixed key.

A run that was begun by an older version must go on with the same noise and the same reparameterizations: if the name of a
stream, the order of a draw or the arithmetic changes, updates of copies that are out would be inverted with other maps, and
nothing else would notice. A deliberate change needs a new state format, and new digests here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = {
    "llama": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 40, "rotary_pct": 0.5, "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40,
        "decoder_sparse_step": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
SETTINGS = {
    "full": {"copies": 3, "kappa": 0.05, "reparameterization": "full"},
    "paper": {
        "copies": 2,
        "kappa": 0.05,
        "reparameterization": "paper",
        "noise_floor": "grid",
        "publish_dtype": "bfloat16",
    },
    "extrapolate": {"copies": 3, "kappa": 0.05, "reparameterization": "full", "denoising": "extrapolate"},
}
EXPECTED = {
    ("llama", "full"): ["fb75d14bddafd8ee", "d4b5a92aea2d7c87", "b2046bd6c14ccfe9", "f6baf2bee4793244"],
    ("llama", "paper"): ["92be2c1d3220fff5", "d158ae1bad208752", "19313e447225587a"],
    ("llama", "extrapolate"): ["33bbec29331372eb", "f7bd3a38f31fca64", "3fb09a0b0c6f98d1", "50d2fcdec2ad5ad9"],
    ("gpt_neox", "full"): ["4429c5ace5170bb9", "9f9766fa7e94d627", "6615bcb78d346333", "d44d8f52a6e0033c"],
    ("gpt_neox", "paper"): ["a8c5bf8a40128b34", "743ab4458e767603", "3d1d880aff7aa69f"],
    ("gpt_neox", "extrapolate"): ["d32a48f4f38c78de", "ec038200f0651f7f", "c12bfad4dd62dedf", "f16ea69641837087"],
    ("qwen3_moe", "full"): ["a22e965a3789be3d", "9aae5641061af104", "634556e226f81bab", "04ff066d93f5298e"],
    ("qwen3_moe", "paper"): ["9fc905998993846a", "44b07ab8b4b2dd3d", "3735cc47ef40d103"],
    ("qwen3_moe", "extrapolate"): ["0ed61df57e6a7228", "bae377d73647a6f5", "5a0205d3a57acd09", "f870b24d86dfd88a"],
}
"""SHA-256 (beginning) over the tensors of each copy, in order, and of the result."""

SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mpunlearn import Perturbation, postprocess, preprocess
from mpunlearn.architecture import FAMILIES, Architecture
from mpunlearn.checkpoint import Checkpoint, TensorDirectory, TensorWriter

config, settings, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])


def values(count, seed):
    # Multiples of 2^-16 in [-1/2, 1/2): the same on every machine.
    return ((torch.arange(count, dtype=torch.int64) * 2654435761 + seed * 40503) % 65536 - 32768).float() / 65536


def digest(path, stem="model"):
    tensors = TensorDirectory(path, stem=stem)
    total = hashlib.sha256()
    for name in sorted(tensors.tensors):
        total.update(name.encode() + tensors.read(name).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


architecture = Architecture(FAMILIES[config["model_type"]], config)
specs = {name: (torch.float32, architecture.shape(architecture.role_of(name))) for name in sorted(architecture.required())}
(folder / "model").mkdir()
(folder / "model" / "config.json").write_text(json.dumps(config))
with TensorWriter(folder / "model", specs) as writer:
    for seed, (name, (_, shape)) in enumerate(specs.items()):
        writer.write(name, values(torch.Size(shape).numel(), seed).view(shape))
state = folder / "state"
state.mkdir(mode=0o700)
(state / "secret.key").write_bytes(bytes(range(32)))
(state / "secret.key").chmod(0o600)
(state / "state.json").write_text(json.dumps({"format": 1, "run": "0" * 32}))
perturbation = Perturbation(common_noise=0, **settings)
copies = preprocess(folder / "model", state=state, out=folder / "copies", perturbation=perturbation).copies
updates = []
for copy in copies:
    source = Checkpoint(copy)
    update = folder / ("update-" + copy.name)
    update.mkdir()
    (update / "update.json").write_text(json.dumps({"format": 1, "mpunlearn": source.config["mpunlearn"]}))
    kept = {name: (torch.float32, info.shape) for name, info in source.tensors.items()}
    with TensorWriter(update, kept, stem="update") as writer:
        for name in kept:
            writer.write(name, source.read(name).float() / 64)
    updates.append(update)
final = postprocess(updates, state=state, out=folder / "final", eta=0.5)
print(json.dumps([*map(digest, copies), digest(final)]))
"""


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "llama")]
)
def test_copies_and_result_of_a_fixed_key(family: str, settings: str, tmp_path: Path) -> None:
    # Vectorized sines and logarithms differ in the last bit between processors; the scalar ones do not.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(CONFIGS[family]), json.dumps(SETTINGS[settings]), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == EXPECTED[family, settings]
