# SPDX-License-Identifier: Apache-2.0
"""Tensors that are computed when they are read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_mtp.serving.late import late

VALUES = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Computation:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        assert torch.is_inference_mode_enabled()
        return VALUES.clone()


@pytest.fixture
def compute() -> Computation:
    return Computation()


@pytest.fixture
def tensor(compute: Computation) -> torch.Tensor:
    return late(compute, torch.empty(2, 3, dtype=torch.int64))


READERS: list[Callable[[torch.Tensor], Any]] = [
    lambda tensor: tensor.to(dtype=torch.int32),
    lambda tensor: tensor.flatten()[torch.arange(6)],
    lambda tensor: torch.zeros(2, 3, dtype=torch.int64).copy_(tensor),
    lambda tensor: torch.stack([tensor, tensor])[0],
    lambda tensor: torch.tensor(tensor.tolist()),
    lambda tensor: torch.from_numpy(tensor.numpy()),
    lambda tensor: tensor[:, :],
    lambda tensor: tensor + 0,
]


@pytest.mark.parametrize("read", READERS)
def test_whoever_reads_gets_the_values(
    tensor: torch.Tensor, compute: Computation, read: Callable[[torch.Tensor], Any]
) -> None:
    found = read(tensor)
    assert type(found) is torch.Tensor
    assert torch.equal(found.reshape(2, 3).long(), VALUES)
    assert compute.calls == 1


def test_shape_type_and_place_need_no_values(
    tensor: torch.Tensor, compute: Computation
) -> None:
    assert torch.is_tensor(tensor)
    assert tensor.shape == tensor.size() == (2, 3)
    assert (tensor.ndim, tensor.dim(), len(tensor), tensor.numel()) == (2, 2, 2, 6)
    assert tensor.dtype == torch.int64
    assert tensor.device.type == "cpu"
    assert compute.calls == 0


def test_it_is_computed_once(tensor: torch.Tensor, compute: Computation) -> None:
    assert torch.equal(tensor.clone(), tensor.clone())
    assert compute.calls == 1


def test_the_reader_gets_what_goes_wrong() -> None:
    def fail() -> torch.Tensor:
        raise ValueError("no values")

    tensor = late(fail, torch.empty(1, 1))
    for _ in range(2):  # and never what happened to be in memory
        with pytest.raises(ValueError, match="no values"):
            tensor.clone()
