"""Bytes from shapes: how large copies, updates and models are, and how much memory training and the server's passes need.

Everything follows from the names, shapes and dtypes of a model's tensors, which a checkpoint's headers or a config.json
give; no weight is loaded. File sizes are exact up to headers and tokenizers. Memory is an estimate: weights, gradients
and the optimizer's state are counted, and activations are a count of the tensors that a transformer layer keeps for its
backward pass.

Several processes, among which weights, gradients and the optimizer's state are divided, are in `sharded`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpunlearn.architecture import FAMILIES, Architecture, TensorRole
from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
from mpunlearn.errors import UnsupportedModelError
from mpunlearn.planning.report import TrainingMemory
from mpunlearn.protocol.exchange import FACTORS
from mpunlearn.protocol.plan import Training
from mpunlearn.server.updates import trained_names

ITEM_BYTES = {name: dtype.itemsize for name, dtype in FLOAT_DTYPES.items()}
FLOAT32 = 4
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "tensor_adam": 4, "adafactor": 0, "sgd": 0}
"""Bytes of state for each trained entry; unknown optimizers are counted like AdamW."""
LOGIT_TENSORS = 4
"""Float32 tensors of the size of the logits that the loss and its backward pass hold at the same time."""
_MANIFEST_BYTES = 140
"""The size of update.json."""
_CODES = {8: "F64", 4: "F32", 2: "BF16"}


@dataclass(frozen=True)
class Shapes:
    """The tensors of a model. Build it with `of_checkpoint` or `of_config`."""

    architecture: Architecture
    roles: Mapping[str, TensorRole]
    shapes: Mapping[str, tuple[int, ...]]
    item_bytes: Mapping[str, int]
    """Bytes of one entry of each tensor, as stored."""

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> "Shapes":
        """The tensors of a checkpoint, from the headers of its files.

        Raises:
            UnsupportedModelError: the model's family or number format cannot be handled exactly.
            CheckpointError: a tensor is missing.
        """
        architecture = Architecture.of(checkpoint)
        roles = architecture.tensor_roles(checkpoint)
        tensors = checkpoint.tensors
        return cls(
            architecture,
            roles,
            {name: tensors[name].shape for name in roles},
            {name: tensors[name].dtype.itemsize for name in roles},
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any], dtype: str = "bfloat16") -> "Shapes":
        """The tensors that a config.json implies, without optional biases, all of one dtype.

        Raises:
            UnsupportedModelError: the family is unknown, or the config does not describe a valid model of it.
        """
        if (family := FAMILIES.get(str(config.get("model_type")))) is None:
            raise UnsupportedModelError(f"model_type {config.get('model_type')!r:.60} is not supported")
        architecture = Architecture(family, config)
        roles = {name: role for name in sorted(architecture.required()) if (role := architecture.role_of(name))}
        shapes = {name: architecture.shape(role) for name, role in roles.items()}
        return cls(architecture, roles, shapes, dict.fromkeys(roles, ITEM_BYTES[dtype]))

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def model_bytes(self) -> int:
        """The size of the model as stored."""
        return self._size({name: self.item_bytes[name] for name in self.shapes})

    def copy_bytes(self, publish_dtype: str | None = None) -> int:
        """The size of a published copy, without its tokenizer.

        Args:
            publish_dtype: its dtype (default: that of each tensor of the model).
        """
        items = {name: ITEM_BYTES[publish_dtype] if publish_dtype else self.item_bytes[name] for name in self.shapes}
        return self._size(items)

    @property
    def theta_bytes(self) -> int:
        """The size of the model between two rounds, which is stored in float32."""
        return self._size({name: max(FLOAT32, self.item_bytes[name]) for name in self.shapes})

    def trained(self, training: Training) -> set[str]:
        """The names of the tensors that a plan trains, or adapts with LoRA.

        For MoE models, whose experts transformers merges, LoRA adapts only what is linear there: this counts everything.
        """
        return trained_names(self.architecture, self.roles, training)

    def trained_entries(self, training: Training) -> int:
        """The number of entries that the optimizer changes; with LoRA, those of the outer factors."""
        names = self.trained(training)
        if rank := training.lora_rank:
            return sum(rank * self.shapes[name][0] for name in names)
        return sum(math.prod(self.shapes[name]) for name in names)

    def adapter_entries(self, training: Training) -> int:
        """The number of entries of both LoRA factors; 0 without LoRA."""
        names = self.trained(training) if training.lora_rank else ()
        return sum(training.lora_rank * sum(self.shapes[name]) for name in names)

    def update_bytes(self, training: Training) -> int:
        """The size of the update of one copy: the trained tensors, or both LoRA factors."""
        item, names = ITEM_BYTES[training.update_dtype], self.trained(training)
        tensors: list[tuple[str, tuple[int, ...], int]] = []
        for name in sorted(names):
            shape, rank = self.shapes[name], training.lora_rank
            if rank:
                tensors += [(name + FACTORS[0], (rank, shape[1]), item), (name + FACTORS[1], (shape[0], rank), item)]
            else:
                tensors.append((name, shape, item))
        return _file_bytes(tensors) + _MANIFEST_BYTES

    def training_bytes(
        self,
        training: Training,
        *,
        examples: int,
        tokens: int,
        answer_tokens: int,
        precision: str = "float32",
        checkpointing: bool = False,
        reference_model: bool = False,
    ) -> TrainingMemory:
        """The memory that training one copy needs, besides the program itself.

        Args:
            training: the training plan.
            examples: forget examples in a micro-batch.
            tokens: length of the longest example of a micro-batch, to which the others are padded.
            answer_tokens: positions of a micro-batch at which logits are computed.
            precision: precision of the forward and backward passes.
            checkpointing: whether activations are recomputed in the backward pass.
            reference_model: whether the reference model itself is in memory, too.
        """
        entries, trained = self.parameters, self.trained_entries(training)
        weights = FLOAT32 * (entries + self.adapter_entries(training))
        if precision != "float32":
            weights += ITEM_BYTES[precision] * entries  # autocast keeps the cast weights of a pass
        positions = examples * tokens
        per_layer = self._kept_entries_per_token() * ITEM_BYTES[precision]
        layers = self.architecture.layers
        kept = per_layer * layers
        if checkpointing:
            kept = per_layer + layers * self.architecture.residual * ITEM_BYTES[precision]
        vocabulary = int(self.architecture.config["vocab_size"])
        return TrainingMemory(
            weights=weights,
            reference=FLOAT32 * entries if reference_model else 0,
            gradients=FLOAT32 * trained * (3 if training.sam_radius else 1),
            optimizer=OPTIMIZER_BYTES.get(training.optimizer, 8) * trained,
            activations=int(positions * kept) + LOGIT_TENSORS * FLOAT32 * examples * answer_tokens * vocabulary,
        )

    def pass_bytes(self, copies: int, threads: int, publish_dtype: str | None = None) -> int:
        """The memory of the server's passes, besides the program itself: a slice on each thread, in every copy.

        Args:
            copies: number of copies.
            threads: number of threads.
            publish_dtype: dtype of the copies.
        """
        largest = max(self._slice_entries(name) for name in self.shapes)
        item = ITEM_BYTES[publish_dtype] if publish_dtype else max(self.item_bytes.values())
        # Pre-Process holds θ as stored and all copies; Post-Process θ, the sum in float32, one update, and its inverse.
        return threads * largest * max(FLOAT32 + copies * item, 4 * FLOAT32)

    def forward_flops(self, tokens: int, answer_tokens: int) -> float:
        """Floating-point operations of a forward pass: two for each weight that a token meets, and the LM head.

        Args:
            tokens: tokens that go through the layers, padding included.
            answer_tokens: positions at which logits are computed.
        """
        architecture = self.architecture
        active = 0.0
        for name, role in self.roles.items():
            if role.layer is not None and len(self.shapes[name]) == 2:
                share = self._experts_per_token() / architecture.experts if role.expert is not None else 1.0
                active += share * math.prod(self.shapes[name])
        head = architecture.residual * int(architecture.config["vocab_size"])
        return 2.0 * (active * tokens + head * answer_tokens)

    def _experts_per_token(self) -> int:
        return int(self.architecture.config.get("num_experts_per_tok") or 1)

    def _kept_entries_per_token(self) -> float:
        """Entries that one layer keeps for its backward pass, for each token.

        The residual stream and its norm twice, and the norms' inputs in float32; queries, keys, values before and after
        RoPE; the attention's output; four tensors of the FFN: gate, up, activation and product.
        """
        architecture, heads = self.architecture, self.architecture.heads
        attention = 2 * heads.dim * (heads.count + 2 * heads.groups) + 2 * heads.count * heads.dim
        if architecture.experts:
            ffn = 4 * architecture.ffn(expert=True) * self._experts_per_token()
        else:
            ffn = 4 * architecture.ffn(expert=False)
        return 6 * architecture.residual + attention + ffn

    def _slice_entries(self, name: str) -> int:
        """Entries of the largest slice of a tensor in the server's passes."""
        from mpunlearn.server.stream import SLICE_ENTRIES

        entries = math.prod(self.shapes[name])
        return min(entries, SLICE_ENTRIES) if self.roles[name].axes[0] == ("vocabulary",) else entries

    def _size(self, item_bytes: Mapping[str, int]) -> int:
        return _file_bytes((name, shape, item_bytes[name]) for name, shape in self.shapes.items())


def _file_bytes(tensors: Iterable[tuple[str, tuple[int, ...], int]]) -> int:
    """The size of a safetensors file.

    Args:
        tensors: name, shape, and bytes of one entry of each tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, item in tensors:
        begin, end = end, end + math.prod(shape) * item
        header[name] = {"dtype": _CODES[item], "shape": list(shape), "data_offsets": [begin, end]}
    return 8 + len(json.dumps(header, separators=(",", ":"))) + end


@dataclass(frozen=True)
class Disk:
    """The disk space that a run takes at its peak, in bytes."""

    server: int
    client: int


def run_disk(shapes: Shapes, training: Training, *, copies: int, rounds: int, copy: int, references: bool) -> int:
    """The peak of a run in one process. A copy is deleted when its update exists, the updates after the round.

    Args:
        shapes: the model.
        training: the training plan.
        copies: number of copies.
        rounds: number of rounds.
        copy: the size of a copy, with its tokenizer.
        references: whether the client keeps the copies of round 1.
    """
    update, theta, final = shapes.update_bytes(training), shapes.theta_bytes, shapes.model_bytes
    kept = copies * copy if references else 0
    trained = max(copies * copy + update, copy + copies * update)
    inner = max(trained, copies * update + theta)  # a round that ends with a float32 model
    last = max(trained, copies * update + final)
    peaks = {"first": inner if rounds > 1 else last, "last": theta + last if rounds > 1 else 0}
    if rounds > 2:
        peaks["middle"] = theta + inner
    return kept + max(peaks.values())


def network_disk(
    shapes: Shapes, training: Training, *, copies: int, rounds: int, copy: int, clients: int, references: bool
) -> Disk:
    """The peak of a run over a network, on the server and on each client, without what waits in a store."""
    update, theta = shapes.update_bytes(training), shapes.theta_bytes
    averages = copies * update if clients > 1 else 0
    server = (2 if rounds > 1 else 1) * theta + copies * copy + clients * copies * update + averages
    client = copy + 2 * update + (copies * copy if references else 0)
    return Disk(server, client)
