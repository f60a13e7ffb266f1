# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp init``."""

from dataclasses import dataclass
from pathlib import Path

from vllm_mtp.cli.folders import new_folder
from vllm_mtp.cli.next_steps import served_line
from vllm_mtp.cli.targets import target_folder
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.layer_spec import EXAMPLES
from vllm_mtp.drafter.options import DrafterOptions, help_of
from vllm_mtp.errors import MTPError
from vllm_mtp.flags import flag


@dataclass(kw_only=True)
class Init(DrafterOptions):
    """Make a new drafter for a target: untrained, but loadable. Layers that are
    `shared` are the target's own, read in place; `own` layers get weights of their
    own, at first a copy of the target layer whose KV cache they read; `mlp:2` are two
    layers without attention. docs/drafter-space.md shows which published systems
    these are."""

    target: str = flag("the target's Hugging Face folder")
    layers: str = flag(f"such as {EXAMPLES}")
    num_speculative_tokens: int = flag(help_of(DrafterConfig, "num_speculative_tokens"))
    out: str = flag("folder to write; must not hold a drafter yet")
    draft_vocab_text: str | None = flag(
        "UTF-8 text file to count the tokens on, one text per line", None
    )
    tokenizer_mode: str = flag(
        "as for `vllm serve`: how that text becomes tokens; auto, or such as mistral",
        "auto",
    )

    def run(self) -> int:
        from vllm_mtp.cli.inspect import describe
        from vllm_mtp.drafter.checkpoint import CONFIG_FILE
        from vllm_mtp.drafter.unused import require_used
        from vllm_mtp.sharing.folder import write_folder
        from vllm_mtp.sharing.provenance import untrained
        from vllm_mtp.torch_host.new_drafter import new_drafter

        self.require_valid(self.num_speculative_tokens)
        require_used(self, [self.layers], self.num_speculative_tokens)
        out = new_folder(self.out, CONFIG_FILE)
        target = target_folder(self.target)
        drafter = new_drafter(
            target,
            self.layers,
            self.num_speculative_tokens,
            self,
            self._draft_token_ids(target),
        )
        write_folder(drafter, out, untrained(drafter.config, target, self.target))
        print(describe(drafter.config))
        print(
            f"\nuntrained drafter written to {out}\n"
            + served_line(drafter.config, out, self.target)
        )
        return 0

    def _draft_token_ids(self, target: Path) -> tuple[int, ...] | None:
        if not self.draft_vocab_size:
            if self.draft_vocab_text is not None:
                raise MTPError(
                    f"draft_vocab_text: got {self.draft_vocab_text!r}, but no size of "
                    "a vocabulary; give --draft-vocab-size, or leave it out"
                )
            return None
        if self.draft_vocab_text is None:
            raise MTPError(
                "--draft-vocab-size needs --draft-vocab-text FILE, the text on which "
                "the target's most frequent tokens are counted"
            )
        from vllm_mtp.drafter.target_facts import hf_config_of
        from vllm_mtp.drafter.vocabulary import most_frequent_tokens, tokens_of
        from vllm_mtp.engine import tokenizer_of

        texts = Path(self.draft_vocab_text)
        if not texts.is_file():
            raise MTPError(f"--draft-vocab-text {texts}: no such file")
        tokenizer = tokenizer_of(target, self.tokenizer_mode)
        rows = hf_config_of(target).get_text_config().vocab_size
        size = len(tokens_of(tokenizer, rows))
        if not 0 < self.draft_vocab_size <= size:
            raise MTPError(
                f"--draft-vocab-size: got {self.draft_vocab_size}, expected 1 to "
                f"{size}, the tokens that the target's tokenizer has"
            )
        try:
            with texts.open(encoding="utf-8") as lines:
                return most_frequent_tokens(
                    tokenizer, lines, self.draft_vocab_size, rows
                )
        except UnicodeDecodeError as error:
            raise MTPError(f"--draft-vocab-text {texts}: not UTF-8 ({error})") from None
