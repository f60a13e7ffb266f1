# SPDX-License-Identifier: Apache-2.0
"""How a target's last norm treats the residual stream, measured."""

import os

import pytest
import torch
from torch import nn

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm_mtp.serving.layer_ways import norm_adds_residual


class Fused(nn.LayerNorm):
    """As vLLM's RMSNorm, which writes into what it is given."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None):
        if residual is None:
            return super().forward(hidden)
        residual += hidden
        return super().forward(residual), residual


class Leaves(nn.LayerNorm):
    """As vLLM's Cohere norms, which hand the residual on."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None):
        return super().forward(hidden), residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "adds"), [(Fused, True), (Leaves, False), (nn.LayerNorm, False)]
)
def test_whether_a_norm_adds_its_residual(
    kind: type[nn.LayerNorm], adds: bool, dtype: torch.dtype
) -> None:
    norm = kind(64).to(dtype)
    with torch.no_grad():
        norm.weight.mul_(3.0)
    assert norm_adds_residual(norm, 64, dtype, torch.device("cpu")) is adds
