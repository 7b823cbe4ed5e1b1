"""An attacker who knows the shape of the noise removes more of it from a matrix of low rank than one who does not."""

import torch

from shaped_noise import without_noise


def test_knowing_the_shape_helps() -> None:
    torch.manual_seed(0)
    signal = torch.randn(200, 3, dtype=torch.float64) @ torch.randn(3, 60, dtype=torch.float64)
    shape = torch.diag(torch.logspace(-1, 1, 60, dtype=torch.float64))
    shape *= (60 / shape.square().sum()).sqrt()
    noisy = signal + torch.randn(200, 60, dtype=torch.float64) @ shape
    unshaped, shaped = ((without_noise(noisy, 1.0, matrix) - signal).norm() for matrix in (None, shape))
    assert shaped < 0.9 * unshaped < 0.9 * (noisy - signal).norm()
