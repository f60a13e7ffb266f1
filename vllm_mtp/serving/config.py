# SPDX-License-Identifier: Apache-2.0
"""From the user's ``speculative_config`` to vLLM's config object."""

import copy
import logging
from pathlib import Path
from typing import Any

from vllm.config import SpeculativeConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.served import require_served
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import MTPError
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving import versions
from vllm_mtp.serving.ledger import install_for_requests, install_for_runner
from vllm_mtp.serving.refusals import (
    require_parts,
    require_readable,
    require_same_target,
    require_supported_engine,
    require_supported_settings,
    require_supported_vllm,
    warn_of_short_rope,
)
from vllm_mtp.serving.resolve import resolve_drafter
from vllm_mtp.serving.settings import checked, num_speculative_tokens, require_v2

logger = logging.getLogger("vllm.mtp_placeholder")

# With one of these, the user chooses how much is drafted.
_LENGTHS = ("num_speculative_tokens", "num_speculative_tokens_per_batch_size")
_FIRST_TO_KEEP = "0.32.0"
_OF_DRAFTER = "draft.*"  # what vLLM calls the parameters of a draft model
_WORKER = "vllm_mtp.serving.worker.DrafterWorker"


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
    require_supported_vllm(versions.installed())
    settings = checked(requested)
    require_supported_settings(settings)
    require_supported_engine(engine_args, target_model_config, target_parallel_config)
    if getattr(engine_args, "enable_prompt_embeds", False):
        # Scheduled ahead of a step that accepts drafts, V1 (no other runner has such
        # prompts) takes tokens for embeddings that nobody gave, and is wrong for all.
        engine_args.async_scheduling = False
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
    require_served(drafter_config, folder)
    try:
        require_same_target(drafter_config, facts, engine_args)
        require_readable(drafter_config, engine_args, target_model_config)
        require_parts(drafter_config, target_model_config, target_parallel_config)
        num_tokens = num_speculative_tokens(
            settings, drafter_config.num_speculative_tokens
        )
    except MTPError as error:
        raise type(error)(f"{folder}: {error}") from None
    takes_any_length = _takes_any_length(settings, target_parallel_config)
    chooses_length = takes_any_length and not any(map(settings.get, _LENGTHS))
    _log_start(folder, drafter_config, num_tokens, chooses_length)
    warn_of_short_rope(target_model_config)
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
    keep_drafter_asleep(target_model_config)
    # Of vLLM's settings, and the user's own class goes first.
    if not target_parallel_config.worker_extension_cls:
        target_parallel_config.worker_extension_cls = _WORKER
    # Whoever builds the config adds the requests: `LLM`, and each API server.
    install_for_requests()
    return config


def keep_drafter_asleep(model: Any) -> None:
    """Have the drafter's weights kept in sleep mode's level 2, which lets go of all.

    The user loads the target's anew after it, and would have to know of ours.
    """
    if not model.enable_sleep_mode or versions.is_older_than(_FIRST_TO_KEEP):
        return
    kept = model.sleep_preserve_parameter_names
    if _OF_DRAFTER not in kept:
        kept.append(_OF_DRAFTER)


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


def _log_start(
    folder: Path, config: DrafterConfig, num_tokens: int, chooses_length: bool
) -> None:
    kinds, read = [layer.kind for layer in config.layers], config.read_layers
    logger.info(
        "%s: drafter %s; %d shared, %d own and %d MLP layers, reading the KV cache of "
        "%s; %s%d tokens per step; KV cache of its own: 0 bytes",
        METHOD,
        folder,
        kinds.count("shared"),
        kinds.count("own"),
        kinds.count("mlp"),
        f"target layers {_ranges(read)}" if read else "no target layer",
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
