# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp push``."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vllm_mtp.flags import flag


@dataclass
class Push:
    """Upload a drafter's folder to the Hugging Face hub: config, weights, card, and
    what is known of training and acceptance, but no checkpoints. The folder is checked
    first. Log in with `hf auth login`."""

    positional: ClassVar[str] = "drafter"

    drafter: str = flag(
        "the drafter's folder; where it comes first, the flag's name can be left out"
    )
    repo_id: str = flag("the repository, such as owner/name; made if need be")
    private: bool = flag("make a new repository private", False)
    revision: str | None = flag("branch; made if need be (default: the main one)", None)
    license: str | None = flag(
        "license of the weights, for the card (default: the target's, if known)", None
    )
    commit_message: str = flag("the commit's first line", "Upload drafter")
    dry_run: bool = flag("only print the list of files and the card", False)

    def run(self) -> int:
        from vllm_mtp.sharing.hub import push_to_hub

        if self.dry_run:
            return self._show()
        address = push_to_hub(
            self.drafter,
            self.repo_id,
            private=self.private or None,
            revision=self.revision,
            commit_message=self.commit_message,
            license=self.license,
        )
        print(f"drafter uploaded to {address}")
        return 0

    def _show(self) -> int:
        from vllm_mtp.sharing.card import CARD_FILE
        from vllm_mtp.sharing.hub import files_to_push

        files = files_to_push(self.drafter, self.repo_id, license=self.license)
        print(f"would go to {self.repo_id} (nothing was sent):")
        for name, file in files.items():
            size = file.stat().st_size if isinstance(file, Path) else len(file)
            print(f"  {name:<20} {size:>15,} bytes")
        card = files[CARD_FILE]
        assert isinstance(card, bytes), "a card is text"
        print(f"\n{CARD_FILE}:\n\n{card.decode()}")
        return 0
