# SPDX-License-Identifier: Apache-2.0
"""How a new drafter is described on a command line or in a YAML file."""

from dataclasses import dataclass, field
from typing import Literal

from vllm_mtp.drafter.config import LoRAConfig
from vllm_mtp.drafter.init import DrafterOptions


def _say(help_text: str) -> dict[str, str]:
    return {"help": help_text}


@dataclass(kw_only=True)
class DrafterDesign:
    """The flags that describe a new drafter; `init` and `train` share them."""

    layers: str = field(
        default="shared:all",
        metadata=_say("such as shared:all, own:0,7,14 or shared:0-9,own:28,29"),
    )
    num_speculative_tokens: int = field(
        default=4, metadata=_say("most tokens to draft per step")
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata=_say("type of the weights in the checkpoint")
    )
    own_init: Literal["copy", "random"] = field(
        default="copy",
        metadata=_say("start of own layers: a copy of the target's layer, or random"),
    )
    boundary_hidden: Literal["none", "first", "all"] = field(
        default="none",
        metadata=_say(
            "own layers that get a projection of the target's last hidden state"
        ),
    )
    boundary_init: Literal["zero", "identity"] = field(
        default="zero", metadata=_say("start of that projection")
    )
    bridges: bool = field(
        default=False,
        metadata=_say(
            "own layers get a linear map in front, in place of the target layers that "
            "are left out there"
        ),
    )
    lora_rank: int | None = field(
        default=None, metadata=_say("LoRA of this rank on shared layers (0: none)")
    )
    lora_alpha: float | None = field(
        default=None, metadata=_say("LoRA scale (default: twice the rank)")
    )
    lora_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj", "o_proj"],
        metadata=_say("linear modules with LoRA"),
    )
    markov_rank: int | None = field(
        default=None, metadata=_say("Markov correction of this rank (0: none)")
    )
    draft_vocab_size: int | None = field(
        default=None,
        metadata=_say("draft only the target's most frequent tokens, this many"),
    )

    prefix_window: int | None = field(
        default=None,
        metadata=_say(
            "read the first 128 tokens of a prefix and about so many of the last "
            "(0: all)"
        ),
    )

    def options(
        self, draft_token_ids: tuple[int, ...] | None, seed: int
    ) -> DrafterOptions:
        """As `init.new_drafter` takes it."""
        return DrafterOptions(
            dtype=self.dtype,
            own_init=self.own_init,
            boundary_hidden=self.boundary_hidden,
            boundary_init=self.boundary_init,
            bridges=self.bridges,
            lora=self.lora_config(),
            markov_rank=self.markov_rank,
            draft_token_ids=draft_token_ids,
            prefix_window=self.prefix_window or None,
            seed=seed,
        )

    def lora_config(self) -> LoRAConfig | None:
        """What the LoRA flags ask for."""
        if not self.lora_rank:
            return None
        return LoRAConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha or 2.0 * self.lora_rank,
            modules=tuple(self.lora_modules),  # type: ignore[arg-type]
        )
