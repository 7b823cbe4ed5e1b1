"""Sharding a model over processes: each of them only ever holds its own rows of every parameter.

The model is built without values, adapted, sharded with FSDP2's `fully_shard`, one transformer layer at a time, and only
then loaded: each process reads the rows of its shard from the checkpoint, in blocks. Memory in the host therefore peaks at
the shard plus one block. Buffers that no checkpoint has, such as the frequencies of RoPE, are computed as in `from_pretrained`.

Where transformers merges several tensors of a checkpoint into one parameter, such as the experts of a layer, the rows of
the parameter are numbered, and the numbers converted like the parameter: this shows which row is stored where. A merge
that does not keep rows together is refused.

`fully_shard` is called here because accelerate does not shard without a GPU, and because with `from_pretrained` of
transformers, adapters cannot be added before the model is loaded. The same code serves a small model on two CPU processes
and a large one on many GPUs.

Not covered: sharding in more than one dimension (tensor, expert or pipeline parallelism).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mpunlearn.checkpoint import FLOAT_DTYPES, Checkpoint
from mpunlearn.client.resources import Resources
from mpunlearn.client.weights import INNER, PREFIX, inner_factor, on_disk, shapes_on_disk
from mpunlearn.errors import CheckpointError, UnloadableError
from mpunlearn.lm.processes import connect, processes, rank
from mpunlearn.protocol.exchange import Card

BLOCK_BYTES = 1 << 26
"""About as many bytes of a checkpoint are read at a time."""


def shard(model: Any, resources: Resources) -> None:
    """Shards a model without values over all processes, in place.

    In bfloat16 or float16, the weights of a layer are gathered in that precision, and gradients are summed in float32.
    Forward passes then need `trainer.autocast`, since inputs are not cast.
    Embeddings, the final norm and the LM head are gathered in float32, as autocast has them in one process.

    Args:
        model: the model, whose tensors are on the meta device.
        resources: precision, and whether shards are kept on the CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

    connect()
    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"mesh": init_device_mesh("cuda" if gpu else "cpu", (processes(),))}
    if resources.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=gpu)
    precision = MixedPrecisionPolicy()
    if resources.precision != "float32":
        dtype = FLOAT_DTYPES[resources.precision]
        precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mp_policy=precision, **options)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embeddings.weight is not head.weight:
        fully_shard(embeddings, **options)
    # By default, the root would keep its weights after a forward pass without gradients, and then miss some gradients.
    fully_shard(model, reshard_after_forward=True, **options)
    # By default, gradients are averaged over processes. Each of them has its part of the loss, so they have to be summed.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def fill(model: Any, source: Checkpoint, resources: Resources, seed: int = 0, card: Card | None = None) -> None:
    """Gives a sharded model its values: those of a checkpoint, and the first values of adapters if it has any.

    Args:
        model: the model, after `shard`.
        source: the checkpoint.
        resources: whether shards are kept on the CPU.
        seed: as for `weights.adapt`.
        card: as for `weights.adapt`.

    Raises:
        CheckpointError: the checkpoint lacks a tensor of the model, or transformers merges tensors in a way that is not
            supported on several processes.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model.to_empty(device="cpu" if resources.cpu_offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    base.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mine = Shard.of(parameter)
            if INNER in name:
                mine.local.copy_(inner_factor(name, parameter.shape, seed, card)[mine.start : mine.stop])
            elif ".lora_" in name:
                mine.local.zero_()
            else:
                _read(source, base, name.removeprefix(PREFIX).replace(".base_layer.", "."), mine)
    # transformers initializes what is not marked: the buffers.
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    base.initialize_weights()


@dataclass(frozen=True)
class Shard:
    """What this process holds of a parameter: its rows `start` to `stop` along the first axis."""

    local: torch.Tensor
    shape: torch.Size
    """Shape of the whole parameter."""
    start: int
    stop: int

    @classmethod
    def of(cls, parameter: Any) -> "Shard":
        """The shard of a parameter. FSDP2 splits the first axis like `torch.chunk`."""
        local, length = parameter.detach().to_local(), parameter.shape[0]
        each = -(-length // processes())
        start, stop = min(rank() * each, length), min((rank() + 1) * each, length)
        assert local.shape[0] == stop - start
        return cls(local, parameter.shape, start, stop)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint that holds rows of a parameter, whose axes but the last are counted as one."""

    name: str
    first: int
    """The row of the parameter that its first row is."""
    rows: int


def stored(model: Any, name: str, shape: torch.Size) -> list[Stored]:
    """The tensors of a checkpoint that a parameter consists of, in the order of its rows.

    Raises:
        UnloadableError: transformers merges them in a way that does not keep rows together.
    """
    axes = max(1, len(shape) - 1)
    numbers = torch.arange(shape[:axes].numel()).reshape(*shape[:axes], *[1] * (len(shape) - axes))
    shapes, found = shapes_on_disk(model, name, shape), []
    for tensor, rows in on_disk(model, {name: numbers}).items():
        rows = rows.flatten()
        if not torch.equal(rows, torch.arange(len(rows)) + rows[0]) or shapes[tensor][1:] != shape[axes:]:
            raise UnloadableError(
                f"{name}: transformers merges {tensor} with others in a way that is not supported on several processes; "
                "use one process"
            )
        found.append(Stored(tensor, int(rows[0]), len(rows)))
    return sorted(found, key=lambda part: part.first)


def _read(source: Checkpoint, model: Any, name: str, shard: Shard) -> None:
    """Reads the rows of a shard.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has it in another shape.
    """
    axes = max(1, len(shard.shape) - 1)
    inner = shard.shape[1:axes].numel()
    flat = shard.local.view(-1, *shard.shape[axes:])
    begin, end = shard.start * inner, shard.stop * inner
    for part in stored(model, name, shard.shape):
        info = source.tensors.get(part.name)
        if info is None or info.shape != (part.rows, *shard.shape[axes:]) or not info.dtype.is_floating_point:
            found = "none" if info is None else f"{info.dtype} {info.shape}"
            raise CheckpointError(
                f"{source.path}: expected a tensor {part.name} of shape {(part.rows, *shard.shape[axes:])}, found {found}; "
                "use one process, or save the model again with `save_pretrained`"
            )
        row = info.nbytes // max(1, part.rows)
        first, last = max(begin, part.first), min(end, part.first + part.rows)
        for start, stop in _blocks(first, last, max(1, BLOCK_BYTES // max(1, row))):
            rows = source.read_rows(part.name, start - part.first, stop - part.first)
            flat[start - begin : stop - begin].copy_(rows)


def _blocks(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, size):
        yield start, min(start + size, last)
