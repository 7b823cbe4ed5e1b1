"""Borrowed memory: never shared while it is in use, and used again afterwards."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.server.stream import in_parallel
from mpunlearn.server.workspace import Workspace

shapes = st.tuples(st.integers(0, 5), st.integers(1, 7))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int16])


@given(st.lists(st.tuples(shapes, dtypes, st.booleans()), max_size=20))
def test_what_is_borrowed_at_the_same_time_never_overlaps(requests: list) -> None:
    """Frames opened and closed at random: every tensor keeps its value until the end of its frame."""
    workspace = Workspace()

    def borrow(rest: list) -> None:
        mine: list[tuple[torch.Tensor, int]] = []
        while rest:
            shape, dtype, deeper = rest.pop()
            tensor = workspace.empty(shape, dtype)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
            value = len(rest) + 1
            tensor.fill_(value)
            mine.append((tensor, value))
            if deeper:
                with workspace.frame():
                    borrow(rest)
            assert all(bool((kept == number).all()) for kept, number in mine)

    with workspace.frame():
        borrow(list(requests))


def test_a_frame_gives_its_memory_back() -> None:
    workspace = Workspace()
    before = workspace.empty((3,), torch.float32)
    pointers = []
    for _ in range(2):
        with workspace.frame():
            pointers.append(
                (workspace.empty((4, 5), torch.float32).data_ptr(), workspace.empty((2,), torch.int16).data_ptr())
            )
    assert pointers[0] == pointers[1]
    assert before.data_ptr() not in pointers[0]
    with pytest.raises(RuntimeError), workspace.frame():
        workspace.empty((100,), torch.float64)
        raise RuntimeError
    assert workspace.empty((20,), torch.float32).data_ptr() != before.data_ptr()


def test_a_copy_has_the_values_of_the_original_and_its_own_memory() -> None:
    workspace, original = Workspace(), torch.arange(6.0).view(2, 3)
    copy = workspace.copy(original, torch.float64)
    original.zero_()
    assert copy.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_threads_have_workspaces_of_their_own() -> None:
    together, seen = threading.Barrier(2, timeout=30), []

    def work(item: int, workspace: Workspace) -> float:
        tensor = workspace.empty((1000,), torch.float32).fill_(item)
        together.wait()
        seen.append(tensor.data_ptr())
        together.wait()
        return float(tensor.mean())

    assert in_parallel([1, 2], work, "two", lambda _: 1) == [1.0, 2.0]
    assert len(set(seen)) == 2
