"""Gradients through networks whose weights were made in inference mode, and that overwrite what they are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib_memnoise.torch_utils.checkpointing import checkpointed
from lib_memnoise.torch_utils.inference_tensors import normal_tensors
from lib_memnoise.torch_utils.out_of_place import OutOfPlace, out_of_place


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.register_buffer("shift", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor, told: dict[str, int]) -> Tensor:
        n = self.mix(self.norm(x)) * (1 + told["block"])
        x += n  # the norm has saved x
        x *= torch.sigmoid(x)
        x -= self.shift * x
        x /= 1 + x.square()
        told["block"] += 1
        return x


class Network(nn.Module):
    """Tells its blocks which they are, as those of Forge do."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(Block() for _ in range(2))
        self.middle_block = Block()

    def forward(self, x: Tensor) -> Tensor:
        told = {"block": 0}
        x = x * 1.5
        for block in (*self.input_blocks, self.middle_block):
            x = block(x, told)
        x += 1
        return x


def networks() -> tuple[Network, Network]:
    """One made in inference mode, and the same as it would be otherwise, in float64."""
    with torch.inference_mode():
        torch.manual_seed(0)
        made = Network().double()
    plain = Network().double()
    plain.load_state_dict({name: value.clone() for name, value in made.state_dict().items()})
    return made, plain.requires_grad_(False)


def difference(network: Network, x: Tensor, direction: Tensor) -> Tensor:
    step = 1e-6
    with torch.no_grad():
        return (network(x + step * direction).norm() - network(x - step * direction).norm()) / (2 * step)


@pytest.mark.parametrize("mode", [False, True])
def test_gradient_is_that_of_finite_differences(mode: bool) -> None:
    made, plain = networks()
    weight = made.middle_block.mix.weight
    x, direction = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.inference_mode():
        before = made(x.clone())
        with torch.inference_mode(False), normal_tensors(made), out_of_place(made):
            assert made.middle_block.mix.weight.data_ptr() == weight.data_ptr()  # no memory of its own
            with torch.enable_grad():
                latent = x.clone().requires_grad_()
                if mode:
                    with checkpointed(made):
                        out = made(latent)
                else:
                    out = made(latent)
                (gradient,) = torch.autograd.grad(out.norm(), latent)
        assert torch.equal(out.detach(), before)
        assert torch.equal(made(x.clone()), before)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference(plain, x, direction)), rel=1e-6)
    assert made.middle_block.mix.weight is weight and weight.is_inference()
    assert all(value.is_inference() for value in (*made.parameters(), *made.buffers()))
    assert "forward" not in made.middle_block.__dict__ and "forward" not in made.__dict__


def test_what_it_is_for() -> None:
    """Without either, there is no gradient."""
    made, plain = networks()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="nference tensor"):
        made(x).norm().backward()
    with pytest.raises(RuntimeError, match="inplace operation"):
        plain(x).norm().backward()


def test_weights_that_are_replaced_meanwhile_stay_so() -> None:
    made, _ = networks()
    other = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    with pytest.raises(ZeroDivisionError), normal_tensors(made):
        made.middle_block.mix.weight = other
        raise ZeroDivisionError
    assert made.middle_block.mix.weight is other
    assert made.input_blocks[0].mix.weight.is_inference()


def test_methods_change_their_tensor_and_augmented_assignments_do_not() -> None:
    x = torch.ones(2)
    kept = x
    with OutOfPlace():
        x.add_(1)
        assert kept.tolist() == [2, 2]
        x += 1
        assert (kept.tolist(), x.tolist()) == ([2, 2], [3, 3])
        y = x
        y[:1] += 1
        assert x.tolist() == [4, 3]
    assert x is not kept


def test_an_optimiser_beside_the_network_is_left_alone() -> None:
    """AdamW counts its steps by `+=`."""
    made, plain = networks()
    start = torch.randn(3, 6, dtype=torch.float64)

    def descended(network: Network) -> Tensor:
        x = start.clone().requires_grad_()
        optimiser = torch.optim.AdamW([x], lr=0.1)
        for _ in range(4):
            optimiser.zero_grad()
            (x.grad,) = torch.autograd.grad(network(x).norm(), x)
            optimiser.step()
        return x.detach()

    with normal_tensors(made), out_of_place(made):
        found = descended(made)

    class Copied(Network):
        """The same without anything overwritten."""

        def forward(self, x: Tensor) -> Tensor:
            with OutOfPlace():
                return super().forward(x)

    copied = Copied().double()
    copied.load_state_dict(plain.state_dict())
    assert torch.allclose(found, descended(copied), rtol=0, atol=1e-12)
