# SPDX-License-Identifier: Apache-2.0
"""What vLLM's workers and their callers see of a drafter.

vLLM mixes the class that ``worker_extension_cls`` names into its worker, so that
``collective_rpc`` finds its methods.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from vllm_mtp.errors import MTPError
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving.resolve import resolve_drafter

logger = logging.getLogger("vllm.mtp_placeholder")


class DraftWeights(nn.ModuleList):
    """What a runner shows vLLM as its draft model: for sleep mode, which keeps its
    parameters and buffers, and not to load weights by vLLM's own way."""

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """Asked by vLLM's sessions for draft weights, before they touch anything.

        They take parameters away until new ones have come, and know of no packed copy.
        """
        raise MTPError(
            f"method {METHOD!r}: vLLM's updates of draft weights do not know this kind "
            "of drafter; use collective_rpc('replace_drafter', args=(folder,))"
        )


class DrafterWorker:
    """Mixed into the worker of an engine that runs our method.

    Attributes:
        model_runner: The worker's.
    """

    model_runner: Any

    def replace_drafter(self, model: str, revision: str | None = None) -> str:
        """Draft with the weights of another drafter from the next step on.

        Requests go on. Nothing is cached for a drafter, so there is nothing to throw
        away.

        Args:
            model: Folder or hub id, as in ``speculative_config``. The drafter must be
                made for this target, and like the one that it replaces but for weights.
            revision: Branch, tag or commit of a hub id.

        Returns:
            The folder that was read.

        Raises:
            MTPError: It cannot be read, or differs. The drafter stays as it is.
        """
        runner = self.model_runner
        drafts = getattr(runner, "speculator", None) or runner.drafter
        facts = drafts._bound.drafter.config.target
        folder: Path = resolve_drafter(
            model, facts.name or "", facts, revision=revision
        )
        drafts.replace_weights(folder)
        logger.info("%s: drafter replaced by %s", METHOD, folder)
        return str(folder)
