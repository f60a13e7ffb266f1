# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp export``."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_mtp.cli.folders import new_folder
from vllm_mtp.cli.targets import target_folder
from vllm_mtp.flags import flag


@dataclass(kw_only=True)
class ExportAdapter:
    """Write a drafter as a PEFT adapter, for engines that draft with one as Uno does
    (arXiv 2609.04010). It must be the whole target with LoRA and noise tokens as
    placeholders, and nothing else; what an adapter cannot say is refused."""

    positional: ClassVar[str] = "drafter"

    drafter: str = flag(
        "the drafter's folder; where it comes first, the flag's name can be left out"
    )
    target: str = flag("the target's folder or hub name")
    out: str = flag("folder to write; must not hold an adapter yet")

    def run(self) -> int:
        from vllm_mtp.drafter.checkpoint import load_drafter
        from vllm_mtp.sharing.names import public_text
        from vllm_mtp.sharing.peft_folder import CONFIG_FILE, write_adapter
        from vllm_mtp.sharing.uno import adapter_of_drafter

        out = new_folder(self.out, CONFIG_FILE)
        drafter = load_drafter(self.drafter)
        target = target_folder(self.target)
        config, pairs, noise = adapter_of_drafter(
            drafter, target, public_text(self.target)
        )
        write_adapter(out, config, pairs, noise)
        k = drafter.config.num_speculative_tokens
        print(
            f"adapter written to {out}: {len(pairs)} pairs, scale "
            f"{config['lora_alpha'] / config['r']:g}\n"
            "What its engine must be told besides:\n"
            f"  tokens per draft   {k}: 1 on the base weights, {k - 1} noise rows\n"
            f"  noise tokens       {noise.low:,} to {noise.high - 1:,} (mask token id "
            f"{noise.high:,})\n"
            f"The drafter's own noise tokens are in {out}/noise.json, which `vllm-mtp "
            "import` reads."
        )
        return 0
