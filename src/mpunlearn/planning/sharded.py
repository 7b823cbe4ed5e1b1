"""Memory and traffic of training on several processes, computed from shapes: what `client.sharding` needs.

Every process keeps its share of the weights, gradients and the optimizer's state. To compute, it gathers the weights of one
transformer layer after another, and has the next one ready; the LM head and the final norm stay gathered during a pass. The
gradients of a layer are summed in float32 and divided again. Activations are those of its own micro-batch.

Not covered: copies that the communication library makes, and memory that the allocator keeps.
"""

import math

from mpunlearn.planning.report import SeveralProcesses, TrainingMemory
from mpunlearn.planning.sizes import FLOAT32, ITEM_BYTES, Shapes
from mpunlearn.protocol.plan import Training

LAYERS_GATHERED = 2
"""Layers whose weights are gathered at the same time: the one that computes, and the next one."""
BLOCK_BYTES = 2 << 26
"""What is read from a checkpoint, or computed for an update, at a time; as stored, and in float32."""


def several_processes(
    shapes: Shapes,
    training: Training,
    one: TrainingMemory,
    *,
    processes: int,
    micro_batches: int,
    alternates: bool = False,
    precision: str = "float32",
    cpu_offload: bool = False,
) -> SeveralProcesses:
    """The memory of each process besides the program itself, and what each receives in an optimizer step.

    Args:
        shapes: the model.
        training: the training plan.
        one: the memory of a single process with the same micro-batch (see `Shapes.training_bytes`).
        processes: number of processes.
        micro_batches: micro-batches of each process in an optimizer step.
        alternates: whether the alternate answers have a forward pass of their own.
        precision: precision of the forward and backward passes.
        cpu_offload: whether shards are kept in the host.
    """
    layer, trained_layer, root, embedding = _groups(shapes, training)
    item = ITEM_BYTES[precision]
    own = FLOAT32 * (shapes.parameters + shapes.adapter_entries(training))
    shard = -(-(own + one.reference + one.gradients + one.optimizer) // processes)
    gathered = LAYERS_GATHERED * item * layer + (item + FLOAT32) * trained_layer
    gathered = max(gathered, FLOAT32 * embedding) + (FLOAT32 + (0 if precision == "float32" else item)) * root
    written = FLOAT32 * max(
        (math.prod(shapes.shapes[name]) for name in shapes.trained(training) if not training.lora_rank), default=0
    )
    host = written + BLOCK_BYTES
    compute = gathered + one.activations
    forget = 2 if training.sam_radius else 1  # how often the forget gradient is taken
    passes = forget + bool(training.resolved().alpha)
    # Weights are gathered for the forward pass, and again for the backward pass.
    layers = item * sum(math.prod(shapes.shapes[name]) for name, role in shapes.roles.items() if role.layer is not None)
    weights = layers + FLOAT32 * (root + embedding)
    received = 2 * (passes + forget * alternates) * weights + passes * FLOAT32 * shapes.trained_entries(training)
    received += passes * weights if one.reference else 0
    return SeveralProcesses(
        processes=processes,
        shard=shard,
        gpu=compute + (0 if cpu_offload else shard),
        host=host + (shard if cpu_offload else 0),
        step_traffic=int(micro_batches * received * (processes - 1) / processes),
    )


def _groups(shapes: Shapes, training: Training) -> tuple[int, int, int, int]:
    """Entries of the largest layer, of its trained part, of the root's weights, and of an embedding of its own."""
    layers: dict[int, int] = {}
    trained: dict[int, int] = {}
    names, root, embedding = shapes.trained(training), 0, 0
    for name, role in shapes.roles.items():
        entries = math.prod(shapes.shapes[name])
        own = training.lora_rank * shapes.shapes[name][0] if training.lora_rank else entries
        if role.layer is not None:
            layers[role.layer] = layers.get(role.layer, 0) + entries
            trained[role.layer] = trained.get(role.layer, 0) + (own if name in names else 0)
        elif name == shapes.architecture.family.embedding and not shapes.architecture.tied:
            embedding += entries
        else:
            root += entries
    return max(layers.values()), max(trained.values()), root, embedding
