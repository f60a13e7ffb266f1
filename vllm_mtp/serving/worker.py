# SPDX-License-Identifier: Apache-2.0
"""What vLLM's workers and their callers see of a drafter.

vLLM mixes the class that ``worker_extension_cls`` names into its worker, so that
``collective_rpc`` finds its methods.
"""

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from vllm_mtp.errors import MTPError
from vllm_mtp.plugin import METHOD

logger = logging.getLogger("vllm.mtp_placeholder")


class DraftWeights(nn.ModuleList):
    """What a runner shows vLLM as its draft model: for sleep mode, which keeps its
    parameters and buffers, and not to load weights by vLLM's own way."""

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """None. vLLM takes the parameters of each away before it loads new ones, and
        knows of no packed copy of them."""
        return iter(())

    def load_weights(self, weights: Any) -> None:
        """Asked by vLLM's sessions for draft weights.

        Raises:
            MTPError: Always.
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

    def replace_drafter(
        self, model: str, revision: str | None = None
    ) -> dict[str, str | None]:
        """Draft with the weights of another drafter from the next step on.

        Requests go on. Nothing is cached for a drafter, so there is nothing to throw
        away. It never raises: vLLM's executor of several workers, of which one has
        raised, takes the others' answers for those of its next call.

        Args:
            model: Folder or hub id, as in ``speculative_config``. The drafter must be
                made for this target, and like the one that it replaces but for weights.
            revision: Branch, tag or commit of a hub id.

        Returns:
            ``drafter``: the folder of what drafts now. ``error``: why that is not the
            new one, else None.
        """
        runner, error = self.model_runner, None
        drafts: Any = getattr(runner, "speculator", None)
        drafts = drafts or getattr(runner, "drafter", None)
        if not hasattr(drafts, "replace_weights"):
            error = f"no drafter of method {METHOD!r} runs here that could be replaced"
            return {"drafter": None, "error": error}
        config = drafts.speculative_config
        try:
            config.model = str(drafts.replace_weights(model, revision))
            logger.info("%s: drafter replaced by %s", METHOD, config.model)
        except Exception as problem:
            error = str(problem)
            logger.warning("%s: the drafter stays: %s", METHOD, error)
        return {"drafter": config.model, "error": error}
