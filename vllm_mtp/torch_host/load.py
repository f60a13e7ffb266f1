# SPDX-License-Identifier: Apache-2.0
"""A frozen target's weights, from its folder into transformers' model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM, AutoModelForImageTextToText

from vllm_mtp.drafter.target_facts import hf_config_of
from vllm_mtp.errors import UnsupportedTargetError


def load_frozen(
    folder: Path | str,
    dtype: str,
    device: torch.device | str,
    device_map: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A target's model, ready to be read and never to be trained.

    Args:
        folder: Its Hugging Face folder.
        dtype: Such as ``"bfloat16"``, or ``"auto"`` for its own.
        device: Where it goes.
        device_map: How accelerate divides it over GPUs, such as
            ``"balanced_low_0"``, or a device for each part; None for ``device`` alone.

    Raises:
        UnsupportedTargetError: Its weights cannot be loaded, or not all of them have
            room on the GPUs.
    """
    config = hf_config_of(folder)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    try:
        model, found = class_of(config).from_pretrained(
            folder,
            dtype=dtype,
            # torch's own attention leaves the cap out.
            attn_implementation="eager" if capped else None,
            output_loading_info=True,
            device_map=device_map,
        )
        # transformers fills them with random numbers.
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{len(missing)} of its tensors are missing, such as {missing[0]}; a "
                "quantised target's config must say how its weights are stored"
            )
        placed = getattr(model, "hf_device_map", {}) if device_map is not None else {}
        _require_on_gpus(placed)
        if not placed:  # on one device, and accelerate had nothing to divide
            # A quantised model may refuse to be moved.
            model = model.to(device)
        return model.eval().requires_grad_(False)
    except Exception as error:  # of files, quantisers, their packages, the device ...
        reason = " ".join(str(error).split())[:500]
        raise UnsupportedTargetError(
            f"--target {folder}: its weights cannot be loaded ({reason}); expected a "
            "Hugging Face folder of a causal language model"
        ) from None


def _require_on_gpus(placed: Mapping[str, Any]) -> None:
    elsewhere = [name for name, at in placed.items() if str(at) in ("cpu", "disk")]
    if elsewhere:
        raise ValueError(
            f"{len(elsewhere)} of its parts, such as {elsewhere[0]}, have no room on "
            "the GPUs that there are; use more of them, or a quantised target"
        )


def class_of(config: Any) -> Any:
    """transformers' class for a target: of language models, or of those that see."""
    texts_only = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if texts_only else AutoModelForImageTextToText


def decoder_of(model: Any) -> Any:
    """The part with the layers; some families take the whole model for it."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else decoder.model
