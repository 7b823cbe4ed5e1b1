"""Hugging Face checkpoint directories: lazy reading, sharded writing, and the files next to the tensors."""

from mpunlearn.checkpoint.companions import COMPANIONS, checkpoint_files, copy_companions, without_paths
from mpunlearn.checkpoint.header import DTYPES, TensorInfo
from mpunlearn.checkpoint.reader import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorDirectory,
    checkpoint_digest,
    dtype_name,
    tensor_digest,
)
from mpunlearn.checkpoint.writer import MAX_SHARD_BYTES, Shard, ShardWriter, TensorWriter, plan_shards, write_index

__all__ = [
    "COMPANIONS",
    "DTYPES",
    "FLOAT_DTYPES",
    "MAX_SHARD_BYTES",
    "Checkpoint",
    "Shard",
    "ShardWriter",
    "TensorDirectory",
    "TensorInfo",
    "TensorWriter",
    "checkpoint_digest",
    "checkpoint_files",
    "copy_companions",
    "dtype_name",
    "plan_shards",
    "tensor_digest",
    "without_paths",
    "write_index",
]
