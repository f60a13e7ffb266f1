# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp init``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_mtp.commands import flag
from vllm_mtp.errors import MTPError


@dataclass
class Init:
    """Make a new drafter for a target: untrained, but loadable. Layers that are
    `shared` are the target's own, read in place; `own` layers get weights of their
    own, at first a copy of the target layer whose KV cache they read."""

    target: str = flag("the target's Hugging Face folder")
    layers: str = flag("such as shared:all, own:0,7,14 or shared:0-9,own:28,29")
    num_speculative_tokens: int = flag("most tokens to draft per step")
    out: str = flag("folder to write; must not hold a drafter yet")
    dtype: Literal["bfloat16", "float16", "float32"] = flag(
        "type of the weights", "bfloat16"
    )
    own_start: Literal["copy", "random"] = flag(
        "start of own layers: a copy of the target's layer, or random", "copy"
    )
    boundary_hidden: bool = flag(
        "add a projection of the target's last hidden state to own layers", False
    )
    lora_rank: int | None = flag("LoRA of this rank on shared layers", None)
    lora_alpha: float | None = flag("LoRA scale (default: twice the rank)", None)
    lora_modules: list[str] = flag(
        "linear modules with LoRA", ["q_proj", "v_proj", "o_proj"]
    )
    markov_rank: int | None = flag("Markov correction of this rank", None)
    draft_vocab_size: int | None = flag(
        "draft only the target's most frequent tokens, this many", None
    )
    draft_vocab_text: str | None = flag(
        "UTF-8 text file to count them on, one text per line", None
    )
    seed: int = flag("seed of the random start values", 0)

    def run(self) -> int:
        from vllm_mtp.checkpoint import CONFIG_FILE, save_drafter
        from vllm_mtp.commands.inspect import describe
        from vllm_mtp.modeling.init import new_drafter

        out = Path(self.out)
        if (out / CONFIG_FILE).exists():
            raise MTPError(
                f"--out {out}: holds a {CONFIG_FILE} already; name another folder, or "
                "remove it first"
            )
        target = _target_folder(self.target)
        drafter = new_drafter(
            target, self.layers, self.num_speculative_tokens, self._options(target)
        )
        save_drafter(drafter, out)
        print(describe(drafter.config))
        print(
            f"\nuntrained drafter written to {out}\nserve it: vllm serve {self.target} "
            '--speculative-config \'{"method":"mtp_placeholder",'
            f'"model":"{out}"}}\''
        )
        return 0

    def _options(self, target: Path):  # type: ignore[no-untyped-def]
        from vllm_mtp.config import LoRAConfig
        from vllm_mtp.modeling.init import DrafterOptions

        lora = None
        if self.lora_rank is not None:
            lora = LoRAConfig(
                rank=self.lora_rank,
                alpha=self.lora_alpha or 2.0 * self.lora_rank,
                modules=tuple(self.lora_modules),  # type: ignore[arg-type]
            )
        return DrafterOptions(
            dtype=self.dtype,
            own_start=self.own_start,
            boundary_hidden=self.boundary_hidden,
            lora=lora,
            markov_rank=self.markov_rank,
            draft_token_ids=self._draft_token_ids(target),
            seed=self.seed,
        )

    def _draft_token_ids(self, target: Path) -> tuple[int, ...] | None:
        if self.draft_vocab_size is None:
            return None
        if self.draft_vocab_text is None:
            raise MTPError(
                "--draft-vocab-size needs --draft-vocab-text FILE, the text on which "
                "the target's most frequent tokens are counted"
            )
        from transformers import AutoConfig, AutoTokenizer

        from vllm_mtp.modeling.vocabulary import most_frequent_tokens

        vocab_size = AutoConfig.from_pretrained(target).get_text_config().vocab_size
        if not 0 < self.draft_vocab_size <= vocab_size:
            raise MTPError(
                f"--draft-vocab-size: got {self.draft_vocab_size}, expected 1 to "
                f"{vocab_size}, the size of the target's vocabulary"
            )
        texts = Path(self.draft_vocab_text)
        if not texts.is_file():
            raise MTPError(f"--draft-vocab-text {texts}: no such file")
        with texts.open(encoding="utf-8") as lines:
            return most_frequent_tokens(
                AutoTokenizer.from_pretrained(target),
                lines,
                self.draft_vocab_size,
                vocab_size,
            )


def _target_folder(target: str) -> Path:
    """A local folder, or a hub repository's local copy."""
    folder = Path(target).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                target, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]
            )
        )
    except Exception as error:  # the hub client raises many kinds
        raise MTPError(
            f"--target {target!r}: no such folder here, and it could not be fetched "
            f"from the hub ({type(error).__name__}: {error})"
        ) from None
