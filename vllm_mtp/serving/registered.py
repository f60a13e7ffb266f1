# SPDX-License-Identifier: Apache-2.0
"""Our config for a vLLM with a registry of methods, which does without most patches.

The registry is what we propose to vLLM (docs/upstream/plugin-methods.md). The config
travels pickled, by the name of its class, so every process finds all of this by it.
"""

from typing import Any, ClassVar

from vllm.sampling_params import SamplingParams

from vllm_mtp.serving.config import MTPPlaceholderSpecConfig, build_config
from vllm_mtp.serving.requests import require_verifiable


class RegisteredSpecConfig(MTPPlaceholderSpecConfig):
    """Registered for our method.

    Attributes:
        proposer_cls: What the V1 runner builds.
        speculator_cls: What the V2 runner builds.
    """

    proposer_cls: ClassVar[str] = "vllm_mtp.serving.v1.MTPPlaceholderProposer"
    speculator_cls: ClassVar[str] = "vllm_mtp.serving.v2.MTPPlaceholderSpeculator"

    @classmethod
    def from_engine_args(
        cls, engine_args: Any, settings: dict[str, Any]
    ) -> MTPPlaceholderSpecConfig:
        """The config for the user's settings.

        Args:
            engine_args: vLLM's ``EngineArgs``.
            settings: The user's, and the target's configs.

        Raises:
            MTPError: As `build_config`.
        """
        requested = dict(settings)
        model = requested.pop("target_model_config")
        parallel = requested.pop("target_parallel_config")
        return build_config(engine_args, requested, model, parallel, cls)

    def verify_sampling_params(self, params: SamplingParams) -> None:
        """Refuse a request, see `require_verifiable`."""
        require_verifiable(params, self)
