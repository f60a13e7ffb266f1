# SPDX-License-Identifier: Apache-2.0
"""What cannot be served, found before vLLM starts anything; each in one line."""

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any

from vllm_mtp.drafter.config import DrafterConfig, require_window
from vllm_mtp.drafter.layout import require_whole_blocks
from vllm_mtp.drafter.sharding import require_divisible
from vllm_mtp.drafter.target_facts import (
    TargetFacts,
    layers_with_attention,
    long_rope_from,
    sliding_windows,
)
from vllm_mtp.errors import (
    TargetMismatchError,
    UnsupportedTargetError,
    UnsupportedVLLMError,
)
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving import versions
from vllm_mtp.serving.connectors import require_known_connector

logger = logging.getLogger("vllm.mtp_placeholder")

_FIRST_FOR_HYBRIDS = "0.32.0"
_ADAPTIVE = "enable_adaptive_verification"
_FIRST_WITH_ESTIMATES = "0.32.0"
_PARALLEL_SIZES = (
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)
_REFUSED_SETTINGS = {
    "watermark_config": "drafts are sampled without the watermark",
    "enable_eplb": "drafts would count as load of the experts, and vLLM prepares the "
    "experts only after the drafter has been bound to them",
}


def require_supported_vllm(found: versions.Installed | None) -> None:
    """Refuse a vLLM that is too old or known to fail; warn of an untested one."""
    if found is None:  # a source tree on the path: nothing tells its version
        return
    if problem := versions.problem_with(found):
        raise UnsupportedVLLMError(
            f"method {METHOD!r} cannot run with {found}: {problem}"
        )
    if caution := versions.caution_about(found):
        _warn_once(f"{METHOD}: {found}: {caution}")


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def require_supported_settings(settings: dict[str, Any]) -> None:
    """Refuse settings of ours that this vLLM does not know for other methods."""
    if settings.get(_ADAPTIVE) and versions.is_older_than(_FIRST_WITH_ESTIMATES):
        raise UnsupportedVLLMError(
            f"speculative_config.{_ADAPTIVE}: got True, but vLLM before "
            f"{_FIRST_WITH_ESTIMATES} does it for another method only. Leave it out, "
            "or install a newer one."
        )


def require_supported_engine(engine_args: Any, model: Any, parallel: Any) -> None:
    """Refuse settings of the engine, and targets, that drafts do not go with.

    Args:
        engine_args: vLLM's ``EngineArgs``.
        model: Its ``ModelConfig`` of the target.
        parallel: Its ``ParallelConfig``.
    """
    for size in _PARALLEL_SIZES:
        if getattr(parallel, size, 1) > 1:
            raise UnsupportedTargetError(
                f"method {METHOD!r}: {size}={getattr(parallel, size)} is not supported "
                "yet. Use 1."
            )
    # The workers look at what vLLM makes of all settings; here it is one line.
    require_known_connector(getattr(engine_args, "kv_transfer_config", None))
    for setting, reason in _REFUSED_SETTINGS.items():
        if getattr(engine_args, setting, None):
            raise UnsupportedTargetError(
                f"method {METHOD!r}: {setting} is set: {reason}. Leave it out, or "
                "serve without this method."
            )
    embeds = getattr(engine_args, "enable_prompt_embeds", False)
    if embeds and engine_args.async_scheduling:
        raise UnsupportedTargetError(
            f"method {METHOD!r}: async_scheduling is on, and so is "
            "enable_prompt_embeds: vLLM answers wrong with both where drafts are "
            "verified. Leave out one of the two."
        )
    text = model.hf_config.get_text_config()
    is_hybrid = len(layers_with_attention(text)) < text.num_hidden_layers
    if is_hybrid and versions.is_older_than(_FIRST_FOR_HYBRIDS):
        raise UnsupportedTargetError(
            f"method {METHOD!r}: some layers of the target have a state in place of a "
            f"cache, which vLLM before {_FIRST_FOR_HYBRIDS} takes up wrongly after a "
            f"step without drafts. Install vLLM {_FIRST_FOR_HYBRIDS} or newer."
        )
    if getattr(model, "uses_xdrope_dim", 0):
        raise UnsupportedTargetError(
            f"method {METHOD!r}: the target uses XD-RoPE (text with several position "
            "axes of its own), which is not supported. Serve it without this method."
        )


def require_same_target(
    config: DrafterConfig, facts: TargetFacts, engine_args: Any
) -> None:
    """Refuse another target, but not RoPE that the user has overridden, if no layer of
    the drafter was trained with the former."""
    made_for = config.target
    overridden = _overrides_rope(getattr(engine_args, "hf_overrides", None))
    rope = {"rope_parameters": made_for.rope_parameters} if overridden else {}
    made_for.require_same(facts.model_copy(update=rope))
    if facts.rope_parameters == made_for.rope_parameters:
        return
    difference = (
        f"target.rope_parameters: the drafter was made for {made_for.rope_parameters}, "
        f"--hf-overrides gives the target {facts.rope_parameters}"
    )
    if len(config.shared_layers) < len(config.layers):
        raise TargetMismatchError(
            f"{difference}, and the drafter has layers of its own that were trained "
            "with the former. Serve the target as it was, or train a drafter on it as "
            "it is; if fewer accepted drafts do, set target.rope_parameters in the "
            "drafter's config.json to the latter"
        )
    logger.warning("%s: %s; fewer drafts may be accepted", METHOD, difference)


def _overrides_rope(overrides: Any) -> bool:
    """Whether ``--hf-overrides`` may change RoPE; a function may change anything."""
    if not isinstance(overrides, dict):
        return callable(overrides)
    return any(
        "rope" in str(key) or _overrides_rope(value)
        for key, value in overrides.items()
        if "rope" in str(key) or isinstance(value, dict)
    )


def require_readable(config: DrafterConfig, engine_args: Any, model: Any) -> None:
    """Refuse a window that the target's own or the cache's blocks do not allow."""
    if config.prefix_window is None:
        return
    windows = sliding_windows(model.hf_config.get_text_config())
    require_window(config, windows.__getitem__)
    # vLLM chooses it where it is not set; then the runner looks at it.
    if engine_args.block_size:
        require_whole_blocks([engine_args.block_size])


def require_bidirectional(config: DrafterConfig, backends: Iterable[Any]) -> None:
    """Refuse attention backends that cannot let a block's rows read what is behind.

    Args:
        config: The drafter's.
        backends: vLLM's ``AttentionBackend`` of each layer that is read.
    """
    if config.block_mask == "causal":
        return
    for backend in backends:
        can = getattr(backend, "supports_non_causal", None)  # not in older releases
        if can is None or not can():
            raise UnsupportedTargetError(
                f"method {METHOD!r}: block_mask: got {config.block_mask!r}, but vLLM's "
                f"attention backend {backend.get_name()} is causal only. Choose "
                "another with --attention-backend (FLASH_ATTN, for one), or use a "
                "drafter whose block_mask is 'causal'"
            )


def require_parts(config: DrafterConfig, model: Any, parallel: Any) -> None:
    """Refuse numbers of ranks and of replicas that the drafter does not go with."""
    require_divisible(config, parallel.tensor_parallel_size)
    # Replicas of a mixture of experts step together: an expert waits for the rows of
    # all of them. Those of a dense target do not know of each other.
    size = parallel.data_parallel_size
    if size > 1 and model.is_moe and config.shared_layers:
        raise UnsupportedTargetError(
            f"data_parallel_size={size}: the target is a mixture of experts, and the "
            "drafter's shared layers would wait inside a draft for replicas that may "
            "be drafting nothing. Use 1, or a drafter of own layers "
            "(vllm-mtp init --layers own:...), which runs no experts."
        )


def warn_of_short_rope(model: Any) -> None:
    """Warn where vLLM will not use the RoPE that the drafter was trained with."""
    least = long_rope_from(model.hf_config.get_text_config())
    if least is not None and model.max_model_len < least:
        logger.warning(
            "%s: with max_model_len=%d vLLM uses longrope's short factors; drafters "
            "are trained with the long ones, and fewer drafts are accepted. Set %d or "
            "more.",
            METHOD,
            model.max_model_len,
            least,
        )
