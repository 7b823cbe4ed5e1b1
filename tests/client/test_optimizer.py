"""One second moment per tensor: Adam where a tensor is one number, and the same in every basis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpunlearn.client.optimizer import TensorAdam


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=12), st.floats(0, 0.1))
@settings(deadline=None)
def test_on_single_numbers_it_is_adamw(gradients: list[float], decay: float) -> None:
    ends = []
    for kind in (TensorAdam, torch.optim.AdamW):
        parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = kind([parameter], lr=0.1, weight_decay=decay)
        for gradient in gradients:
            parameter.grad = torch.tensor([gradient], dtype=torch.float64)
            optimizer.step()
        ends.append(float(parameter.detach()))
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


@pytest.mark.parametrize(("kind", "same"), [(TensorAdam, True), (torch.optim.AdamW, False)])
def test_a_rotated_problem_has_the_rotated_path(kind, same: bool) -> None:
    torch.manual_seed(0)
    start, aim = torch.randn(2, 6, 5, dtype=torch.float64)
    metric = torch.diag(torch.linspace(0.1, 3, 6, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    ends = []
    for basis in (torch.eye(6, dtype=torch.float64), turn):
        parameter = torch.nn.Parameter(basis @ start)
        optimizer = kind([parameter], lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            apart = basis.T @ parameter - aim
            (apart * (metric @ apart)).sum().backward()
            optimizer.step()
        ends.append(basis.T @ parameter.detach())
    assert (float((ends[0] - ends[1]).abs().max()) < 1e-10) is same


def test_what_has_no_gradient_stays() -> None:
    still = torch.nn.Parameter(torch.ones(3))
    TensorAdam([still], weight_decay=0.5).step()
    assert torch.equal(still.detach(), torch.ones(3))
