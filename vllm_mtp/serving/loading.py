# SPDX-License-Identifier: Apache-2.0
"""Load a drafter in a worker and bind it to the loaded target (both runners)."""

from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.sharding import part_of
from vllm_mtp.errors import CheckpointError
from vllm_mtp.serving.adapters import without_adapters
from vllm_mtp.serving.compiled import compile_layers
from vllm_mtp.serving.connectors import require_known_connector
from vllm_mtp.serving.kernels import merge_changes, use_vllm_kernels
from vllm_mtp.serving.ledger import install_for_runner
from vllm_mtp.serving.resolve import resolve_drafter
from vllm_mtp.serving.vllm_target import VllmTarget, this_rank


def load_bound_drafter(
    target_model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device
) -> tuple[BoundDrafter, VllmTarget]:
    """This rank's part of the drafter that the config names, on the target.

    Args:
        target_model: vLLM's loaded target.
        vllm_config: Its ``speculative_config`` is ours.
        device: Where the target is.

    Raises:
        MTPError: The drafter cannot be read or does not fit the target, or a KV
            connector is in use that has not been tried.
    """
    # As vLLM made it, some of other settings, after it had built our config.
    require_known_connector(vllm_config.kv_transfer_config)
    # Of the target's modules, which were not loaded before.
    install_for_runner(vllm_config)
    spec_config = vllm_config.speculative_config
    assert spec_config is not None
    assert spec_config.model is not None
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype), "vLLM resolved it before"
    # Cut before it is moved: the device never holds more than the rank's part.
    whole = load_drafter(Path(spec_config.model), dtype=dtype)
    drafter = part_of(whole, this_rank()).to(device)
    host = VllmTarget(without_adapters(target_model), vllm_config, drafter.config)
    bound = BoundDrafter(drafter, host)
    _use_vllm_kernels(bound)
    compile_layers(bound, vllm_config)
    return bound, host


@torch.inference_mode()
def replace_weights(
    bound: BoundDrafter, host: VllmTarget, model: str, revision: str | None
) -> Path:
    """Put another drafter's weights in the place of those that draft.

    A drafter keeps nothing between steps, so the next draft is the new one's. Only
    weights can be replaced: buffers, graphs and attention metadata follow from the
    rest.

    Args:
        bound: The drafter that drafts, this rank's part.
        host: Its target.
        model: The other drafter, as in ``speculative_config``; its config must be the
            same.
        revision: Of a hub id.

    Returns:
        The folder that was read.

    Raises:
        MTPError: It cannot be read, or has another config, on this rank or another. The
            drafter stays as it is on all.
    """
    now, problem = bound.drafter, None
    facts = now.config.target
    try:
        folder = resolve_drafter(model, facts.name or "", facts, revision=revision)
        new = part_of(load_drafter(folder, dtype=host.dtype), this_rank())
        _require_same(new.config, now.config, folder)
        weights = new.state_dict()
    except Exception as error:  # the other ranks wait for what this one says
        problem = error
    if not _on_all_ranks(problem is None):
        raise problem or CheckpointError(
            f"{model}: another rank cannot take this drafter, see its error"
        )
    for name, tensor in now.state_dict().items():
        tensor.copy_(weights[name])
    _use_vllm_kernels(bound)
    host.take_weights()
    return folder


def _use_vllm_kernels(bound: BoundDrafter) -> None:
    use_vllm_kernels(bound.drafter)
    merge_changes(bound.changed_linears)


def _on_all_ranks(good: bool) -> bool:
    """Whether all ranks that share the target say so."""
    group = get_tp_group()
    if group.world_size == 1:
        return good
    bad = torch.tensor(not good, dtype=torch.int32)
    torch.distributed.all_reduce(bad, group=group.cpu_group)
    return not bad


def _require_same(new: DrafterConfig, now: DrafterConfig, folder: Path) -> None:
    new.target.require_same(now.target)
    for name in type(now).model_fields:
        got, expected = getattr(new, name), getattr(now, name)
        # How it is stored and what the target is called change no draft.
        if name not in ("dtype", "target") and got != expected:
            raise CheckpointError(
                f"{folder}: {name}: got {got!r}, expected {expected!r}, as the drafter "
                "that is to be replaced has it. Start the engine anew with this one."
            )
