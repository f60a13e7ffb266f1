# SPDX-License-Identifier: Apache-2.0
"""Weights of a quantised target's folder as plain ones, for layers that start there.

Eight bits with scales alone: what transformers and compressed-tensors write for int8
and float8. Packed formats of four bits are left as they are.
"""

from collections.abc import Mapping, Sequence

import torch

from vllm_mtp.errors import UnsupportedTargetError

_EIGHT_BITS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
# Beside a weight, of what is computed with it while serving.
_OF_ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale", ".q_scale")
_BLOCK = (128, 128)


def dequantised(
    tensors: Mapping[str, torch.Tensor], block: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """Multiply weights by their scales.

    Args:
        tensors: Of one layer, by name; weights ``[rows, columns]``.
        block: Rows and columns that share a scale, where scales are in two dimensions;
            None for 128 of each.

    Returns:
        The same without scales; float32 where there were some.

    Raises:
        UnsupportedTargetError: A weight of eight bits has no scale that fits it.
    """
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(_OF_ACTIVATIONS)
    }
    for name, weight in list(found.items()):
        if weight.dtype not in _EIGHT_BITS or not name.endswith(".weight"):
            continue
        scale = found.pop(f"{name}_scale", None)
        if scale is None:
            scale = found.pop(f"{name}_scale_inv", None)
        zero_point = found.pop(f"{name}_zero_point", None)
        spread = None if scale is None else _spread(scale.float(), weight, block)
        if spread is None or (zero_point is not None and zero_point.float().any()):
            raise UnsupportedTargetError(
                f"the target's {name} is {weight.dtype} and has no scale that fits it, "
                "so no own layer can start from it. Use shared layers, or --own-init "
                "random."
            )
        found[name] = weight.float() * spread
    return found


def _spread(
    scale: torch.Tensor, weight: torch.Tensor, block: Sequence[int] | None
) -> torch.Tensor | None:
    """A scale that can be multiplied with the weight; None where it does not fit."""
    rows, columns = weight.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape in ((rows,), (rows, 1)):
        return scale.reshape(rows, 1)
    high, wide = block or _BLOCK
    if scale.shape != (-(-rows // high), -(-columns // wide)):
        return None
    scale = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return scale[:rows, :columns]
