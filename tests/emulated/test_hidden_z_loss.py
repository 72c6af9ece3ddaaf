"""hidden_z_loss: the CUDA kernels on the emulator against the reference in float64."""

import pytest
import torch

from mmoe.reference import hidden_z_loss as reference

COEFFICIENT = 0.5
# A row of fewer elements than a vector, one ragged, one that fills every lane's vectors twice with a tail.
WIDTHS = [1, 7, 24, 517]


def draw(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + width)
    return (3 * torch.randn(tokens, width, generator=generator)).to(dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(emulated, dtype, width, masked):
    z = draw(9, width, dtype)
    valid = torch.arange(9) % 3 != 1 if masked else None
    loss, lse, count = emulated.hidden_z_loss(z, valid, COEFFICIENT)
    grad = emulated.hidden_z_loss_backward(torch.tensor(1.5), z, lse, count, COEFFICIENT)

    exact = z.double().requires_grad_()
    wanted = reference.hidden_z_loss(exact, COEFFICIENT, valid)
    (wanted_grad,) = torch.autograd.grad(1.5 * wanted, exact)
    # fp32 arithmetic on the given z: a few roundings of values of size lse < 20.
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=2e-6, atol=0)
    assert count == (9 if valid is None else valid.sum())
    # The gradient adds its own rounding to the storage type: half a unit in the last place.
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=rounding + 4e-6, atol=torch.finfo(dtype).tiny)


def test_rows_off_the_vector_grid(emulated):
    """A view that starts 4 bytes off takes the scalar path and gives the same numbers up to the order of sums."""
    z = draw(5, 64, torch.float32)
    shifted = torch.cat([torch.zeros(1), z.flatten()])[1:].view(5, 64)
    torch.testing.assert_close(
        emulated.hidden_z_loss(shifted, None, 1.0), emulated.hidden_z_loss(z, None, 1.0), rtol=1e-6, atol=0
    )


def test_nothing_to_count(emulated):
    for z, valid in [(torch.zeros(0, 8), None), (torch.ones(3, 8), torch.zeros(3, dtype=torch.bool))]:
        loss, lse, count = emulated.hidden_z_loss(z, valid, 1.0)
        assert loss == 0
        assert count == 0
        assert not emulated.hidden_z_loss_backward(torch.ones(()), z, lse, count, 1.0).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(emulated, bad):
    z = torch.ones(4, 40)
    z[2, 17] = bad
    loss, lse, _ = emulated.hidden_z_loss(z, None, 1.0)
    assert not loss.isfinite()
    assert lse.isfinite().tolist() == [True, True, False, True]
