# SPDX-License-Identifier: Apache-2.0
"""From the user's ``speculative_config`` to vLLM's config object."""

import copy
import logging
from functools import cache
from pathlib import Path
from typing import Any

from vllm.config import SpeculativeConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_mtp.drafter.checkpoint import load_drafter
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
    MTPError,
    TargetMismatchError,
    UnsupportedTargetError,
    UnsupportedVLLMError,
)
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving import versions
from vllm_mtp.serving.connectors import require_known_connector
from vllm_mtp.serving.ledger import install_for_requests, install_for_runner
from vllm_mtp.serving.resolve import resolve_drafter
from vllm_mtp.serving.settings import checked, num_speculative_tokens, require_v2

logger = logging.getLogger("vllm.mtp_placeholder")

# With one of these, the user chooses how much is drafted.
_LENGTHS = ("num_speculative_tokens", "num_speculative_tokens_per_batch_size")
_FIRST_FOR_HYBRIDS = "0.32.0"
_ADAPTIVE = "enable_adaptive_verification"
_FIRST_WITH_ESTIMATES = "0.32.0"
_OF_DRAFTER = "draft.*"  # what vLLM calls the parameters of a draft model
_WORKER = "vllm_mtp.serving.worker.DrafterWorker"
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


class MTPPlaceholderSpecConfig(SpeculativeConfig):
    """vLLM's config of our method.

    To vLLM it is ``draft_model``, the family with k lookahead slots, no dropped
    prefix-cache block and no prefill of its own. ``model`` is the drafter's
    folder; ``draft_model_config`` is the target's, since the drafter runs on the
    target's own modules.

    Attributes:
        takes_any_length: Whether each request can have another number of drafts in
            each step.
        chooses_length: Whether the number of drafts follows from what is measured.
        runner_has_drafter: Whether this process's runner was given our drafter.
    """

    # Not fields: the base class lists its own, and takes no other.
    takes_any_length: bool = False
    chooses_length: bool = False
    runner_has_drafter: bool = False

    def __post_init__(self) -> Any:
        # The family "ngram" makes the base class take the target's configs for
        # the draft's, and never guess a method from the folder's name.
        self.method = "ngram"
        super().__post_init__()
        self.method = "draft_model"
        self.prompt_lookup_min = self.prompt_lookup_max = 0
        self.draft_model_config = copy.copy(self.target_model_config)
        # The runner stops drafting for the whole batch when one request comes
        # near this limit. Our rows beyond the target's limit are masked instead.
        self.draft_model_config.max_model_len = (
            self.target_model_config.max_model_len + self.num_speculative_tokens
        )
        return self

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """The drafter has buffers of its own: the token budget stays untouched."""
        return 0

    def uses_draft_model(self) -> bool:
        """Asked by the V1 runner, see `_prepare_runner`."""
        self._prepare_runner()
        return True

    def use_dspark(self) -> bool:
        """Asked by the V2 runner, see `_prepare_runner`."""
        self._prepare_runner()
        return False

    def _prepare_runner(self) -> None:
        """Patch what the runner of this process needs to build our drafter.

        vLLM tells a plugin of no worker, so a question that a runner asks before it
        builds its drafter has to do: nothing else of ours runs in that process until
        then. V1 asks again in every step, when there is nothing left to do.
        """
        if not self.runner_has_drafter:
            install_for_runner()

    def __repr__(self) -> str:
        return (
            f"SpeculativeConfig(method={METHOD!r}, model={self.model!r}, "
            f"num_spec_tokens={self.num_speculative_tokens})"
        )


def is_ours(vllm_config: Any) -> bool:
    """Whether a ``VllmConfig`` asks for our method."""
    return isinstance(
        getattr(vllm_config, "speculative_config", None), MTPPlaceholderSpecConfig
    )


def build_config(
    engine_args: Any,
    requested: dict[str, Any],
    target_model_config: Any,
    target_parallel_config: Any,
    config_class: type[MTPPlaceholderSpecConfig] = MTPPlaceholderSpecConfig,
) -> MTPPlaceholderSpecConfig:
    """Find and check the drafter, and build vLLM's config for it.

    Args:
        engine_args: vLLM's ``EngineArgs``.
        requested: The user's settings.
        target_model_config: vLLM's ``ModelConfig`` of the target.
        target_parallel_config: vLLM's ``ParallelConfig``.
        config_class: What to build.

    Raises:
        MTPError: Whatever is wrong with vLLM, settings, target or drafter.
    """
    _require_supported_vllm(versions.installed())
    settings = checked(requested)
    if settings.get(_ADAPTIVE) and versions.is_older_than(_FIRST_WITH_ESTIMATES):
        raise UnsupportedVLLMError(
            f"speculative_config.{_ADAPTIVE}: got True, but vLLM before "
            f"{_FIRST_WITH_ESTIMATES} does it for another method only. Leave it out, "
            "or install a newer one."
        )
    _require_supported(engine_args, target_model_config, target_parallel_config)
    facts = TargetFacts.from_hf_config(
        target_model_config.hf_config, name=target_model_config.model
    )
    folder = resolve_drafter(
        settings.get("model"),
        target_model_config.model,
        facts,
        revision=settings.get("revision"),
    )
    # Everything that can be wrong with a drafter is found here, where the user
    # still sees it, and not in a worker's stack trace.
    drafter_config = load_drafter(folder, dtype=target_model_config.dtype).config
    try:
        overridden = _overrides_rope(getattr(engine_args, "hf_overrides", None))
        _require_fits(drafter_config, facts, overridden)
        _require_readable(drafter_config, engine_args, target_model_config)
        _require_no_experts(drafter_config, target_model_config, target_parallel_config)
        require_divisible(drafter_config, target_parallel_config.tensor_parallel_size)
        num_tokens = num_speculative_tokens(
            settings, drafter_config.num_speculative_tokens
        )
    except MTPError as error:
        raise type(error)(f"{folder}: {error}") from None
    takes_any_length = _takes_any_length(settings, target_parallel_config)
    chooses_length = takes_any_length and not any(map(settings.get, _LENGTHS))
    _log_start(folder, drafter_config, num_tokens, chooses_length)
    _warn_of_short_rope(target_model_config)
    settings |= {
        "method": "ngram",
        "model": str(folder),
        "num_speculative_tokens": num_tokens,
        "target_model_config": target_model_config,
        "target_parallel_config": target_parallel_config,
    }
    config = config_class(**settings)
    config.takes_any_length = takes_any_length
    config.chooses_length = chooses_length
    if not versions.may_take_v2(HAS_TRITON):
        require_v2(config)
    _keep_drafter_asleep(target_model_config)
    # Of vLLM's settings, and the user's own class goes first.
    if not target_parallel_config.worker_extension_cls:
        target_parallel_config.worker_extension_cls = _WORKER
    # Whoever builds the config adds the requests: `LLM`, and each API server.
    install_for_requests()
    return config


def _keep_drafter_asleep(model: Any) -> None:
    """Have the drafter's weights kept in sleep mode's level 2, which lets go of all.

    The user loads the target's anew after it, and would have to know of ours.
    """
    kept = getattr(model, "sleep_preserve_parameter_names", None)  # from 0.31 on
    if model.enable_sleep_mode and kept is not None and _OF_DRAFTER not in kept:
        kept.append(_OF_DRAFTER)


def _require_fits(config: DrafterConfig, facts: TargetFacts, overridden: bool) -> None:
    """Refuse another target, but not RoPE that the user has overridden, if no layer of
    the drafter was trained with the former."""
    made_for = config.target
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


def _require_no_experts(config: DrafterConfig, model: Any, parallel: Any) -> None:
    """Replicas of a mixture of experts step together: an expert waits for the rows of
    all of them. Those of a dense target do not know of each other."""
    size = parallel.data_parallel_size
    if size > 1 and model.is_moe and config.shared_layers:
        raise UnsupportedTargetError(
            f"data_parallel_size={size}: the target is a mixture of experts, and the "
            "drafter's shared layers would wait inside a draft for replicas that may "
            "be drafting nothing. Use 1, or a drafter of own layers "
            "(vllm-mtp init --layers own:...), which runs no experts."
        )


def _overrides_rope(overrides: Any) -> bool:
    """Whether ``--hf-overrides`` may change RoPE; a function may change anything."""
    if not isinstance(overrides, dict):
        return callable(overrides)
    return any(
        "rope" in str(key) or _overrides_rope(value)
        for key, value in overrides.items()
        if "rope" in str(key) or isinstance(value, dict)
    )


def _require_readable(config: DrafterConfig, engine_args: Any, model: Any) -> None:
    """Refuse a window that the target's own or the cache's blocks do not allow."""
    if config.prefix_window is None:
        return
    windows = sliding_windows(model.hf_config.get_text_config())
    require_window(config, windows.__getitem__)
    # vLLM chooses it where it is not set; then the runner looks at it.
    if engine_args.block_size:
        require_whole_blocks([engine_args.block_size])


def _takes_any_length(settings: dict[str, Any], target_parallel_config: Any) -> bool:
    """Whether the runner drafts late, when it can give each request what it likes.

    Elsewhere vLLM takes only drafts of one length, or has planned them already.
    """
    return (
        current_platform.is_cpu()
        and target_parallel_config.world_size == 1
        and settings.get("draft_sample_method", "greedy") == "greedy"
        and versions.forced_runner() != "V2"
    )


def _require_supported_vllm(found: versions.Installed | None) -> None:
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


def _require_supported(engine_args: Any, model: Any, parallel: Any) -> None:
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


def _warn_of_short_rope(model: Any) -> None:
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


def _log_start(
    folder: Path, config: DrafterConfig, num_tokens: int, chooses_length: bool
) -> None:
    kinds = [layer.kind for layer in config.layers]
    logger.info(
        "%s: drafter %s; %d shared and %d own layers, reading the KV cache of target "
        "layers %s; %s%d tokens per step; KV cache of its own: 0 bytes",
        METHOD,
        folder,
        kinds.count("shared"),
        kinds.count("own"),
        _ranges(config.bound_layers),
        "as many as pay off, at most " if chooses_length else "",
        num_tokens,
    )


def _ranges(numbers: tuple[int, ...]) -> str:
    """``(0, 1, 2, 7)`` as ``0-2,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
