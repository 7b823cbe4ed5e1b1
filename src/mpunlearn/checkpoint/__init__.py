"""Hugging Face checkpoint directories: lazy reading, sharded writing, and the files next to the tensors."""

from mpunlearn.checkpoint.companions import COMPANIONS, checkpoint_files, copy_companions, without_paths
from mpunlearn.checkpoint.reader import (
    DTYPES,
    FLOAT_DTYPES,
    Checkpoint,
    TensorDirectory,
    TensorInfo,
    checkpoint_digest,
    dtype_name,
    tensor_digest,
)
from mpunlearn.checkpoint.writer import TensorWriter

__all__ = [
    "COMPANIONS",
    "DTYPES",
    "FLOAT_DTYPES",
    "Checkpoint",
    "TensorDirectory",
    "TensorInfo",
    "TensorWriter",
    "checkpoint_digest",
    "checkpoint_files",
    "copy_companions",
    "dtype_name",
    "tensor_digest",
    "without_paths",
]
