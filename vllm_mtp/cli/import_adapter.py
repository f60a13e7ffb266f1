# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp import``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vllm_mtp.cli.folders import new_folder
from vllm_mtp.cli.next_steps import checked_line, served_line
from vllm_mtp.cli.targets import target_folder
from vllm_mtp.errors import MTPError, in_one_line
from vllm_mtp.flags import flag

if TYPE_CHECKING:
    from vllm_mtp.drafter.config import NoiseConfig
    from vllm_mtp.drafter.target_facts import TargetFacts


@dataclass(kw_only=True)
class ImportAdapter:
    """Make a drafter of a PEFT adapter that was trained to draft as Uno does (arXiv
    2609.04010): the target's own layers, with the adapter on the rows of noise tokens.
    What stands in the adapter's config and has no place in a drafter is refused."""

    positional: ClassVar[str] = "adapter"

    adapter: str = flag(
        "the adapter's folder or hub name; where it comes first, the flag's name can "
        "be left out"
    )
    target: str = flag("the target's folder or hub name")
    num_speculative_tokens: int | None = flag(
        "tokens drafted per step, that of the row without noise included: K of Uno "
        "(default: as noise.json beside the adapter says)",
        None,
    )
    out: str = flag("folder to write; must not hold a drafter yet")
    subfolder: str = flag("folder of the adapter inside that, such as adapter", "")
    revision: str | None = flag("branch or commit of the adapter on the hub", None)
    mask_token_id: int | None = flag(
        "noise tokens are below this one, as the adapter was trained (default: what "
        "noise.json or the target's config says, else its vocabulary size)",
        None,
    )
    noise_low: int | None = flag(
        "least noise token (default: what noise.json says, else 1)", None
    )
    noise_ids: list[int] = flag(
        "the noise tokens, one less than tokens drafted (default: those of noise.json, "
        "else drawn by --seed)",
        [],
    )
    seed: int = flag("seed of the noise tokens that are drawn", 0)

    def run(self) -> int:
        from vllm_mtp.cli.inspect import describe
        from vllm_mtp.drafter.checkpoint import CONFIG_FILE
        from vllm_mtp.drafter.config import MAX_SPECULATIVE_TOKENS
        from vllm_mtp.drafter.target_facts import TargetFacts
        from vllm_mtp.sharing.folder import write_folder
        from vllm_mtp.sharing.names import cached_revision
        from vllm_mtp.sharing.peft_folder import read_adapter
        from vllm_mtp.sharing.provenance import adapter_record, imported
        from vllm_mtp.sharing.uno import drafter_of_adapter

        out = new_folder(self.out, CONFIG_FILE)
        root = _adapter_folder(self.adapter, self.subfolder, self.revision)
        adapter = read_adapter(root / self.subfolder)
        k = self.num_speculative_tokens
        if k is None and adapter.noise is not None:
            k = len(adapter.noise.token_ids) + 1
        if k is None:
            raise MTPError(
                "num_speculative_tokens: got nothing, and the adapter has no "
                "noise.json that would say it; expected the tokens drafted per step, "
                "such as 4"
            )
        if not 2 <= k <= MAX_SPECULATIVE_TOKENS:
            raise MTPError(
                f"num_speculative_tokens: got {k}, expected 2 to "
                f"{MAX_SPECULATIVE_TOKENS}: a row without noise, and those with noise, "
                "on which the adapter acts"
            )
        target = target_folder(self.target)
        noise = self._noise(k, adapter.noise, target, TargetFacts.from_folder(target))
        drafter = drafter_of_adapter(adapter, target, k, noise)
        record = adapter_record(
            root / self.subfolder, self.adapter, adapter, cached_revision(str(root))
        )
        write_folder(
            drafter, out, imported(drafter.config, target, self.target, record)
        )
        print(describe(drafter.config))
        base = record.base_model or "nothing"
        if Path(base).name != Path(self.target).name:
            print(
                f"\nWARNING: the adapter names {base} as its base model, and --target "
                f"is {self.target}: if these are not the same weights, its drafts are "
                "bad"
            )
        print(
            f"\ndrafter written to {out}\n"
            + checked_line(drafter.config, out, self.target)
            + served_line(drafter.config, out, self.target)
        )
        return 0

    def _noise(
        self,
        k: int,
        recorded: "NoiseConfig | None",
        target: Path,
        facts: "TargetFacts",
    ) -> "NoiseConfig":
        """The noise tokens of ``k`` - 1 rows; flags win over what is recorded."""
        from vllm_mtp.drafter.config import NoiseConfig
        from vllm_mtp.drafter.noise import draw_noise_config
        from vllm_mtp.drafter.options import require_noise_range
        from vllm_mtp.drafter.target_facts import hf_config_of

        low, high = self.noise_low, self.mask_token_id
        if low is None:
            low = 1 if recorded is None else recorded.low
        if high is None and recorded is not None:
            high = recorded.high
        if high is None:
            high = getattr(hf_config_of(target), "mask_token_id", None)
        high = facts.vocab_size if high is None else high
        require_noise_range(low, high, facts.vocab_size)
        ids = tuple(self.noise_ids)
        if not ids and recorded is not None and len(recorded.token_ids) >= k - 1:
            ids = recorded.token_ids[: k - 1]
        if not ids:
            return draw_noise_config(low, high, k - 1, self.seed)
        if wrong := [i for i in ids if not low <= i < high]:
            raise MTPError(
                f"noise_ids: got {wrong[0]}, expected {low} to {high - 1} (noise_low "
                "and mask_token_id say so)"
            )
        if len(ids) != k - 1:
            raise MTPError(
                f"noise_ids: got {len(ids)} ids, expected {k - 1}, one less than "
                "num_speculative_tokens"
            )
        return NoiseConfig(low=low, high=high, token_ids=ids)


def _adapter_folder(adapter: str, subfolder: str, revision: str | None) -> Path:
    """A local folder, or a hub repository's local copy with the adapter's files alone:
    some hold a base model as well."""
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise MTPError(
                f"revision: got {revision!r}, but {adapter} is a folder here; leave it "
                "out"
            )
        return folder
    from huggingface_hub import snapshot_download

    from vllm_mtp.sharing.peft_folder import CONFIG_FILE, NOISE_FILE, WEIGHTS_FILE

    base = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [f"{base}{name}" for name in (CONFIG_FILE, WEIGHTS_FILE, NOISE_FILE)]
    try:
        return Path(
            snapshot_download(
                adapter,
                revision=revision,
                allow_patterns=[*wanted, f"*/{CONFIG_FILE}"],
            )
        )
    except Exception as error:  # the hub client raises many kinds
        raise MTPError(
            f"--adapter {adapter!r}: no such folder here, and it could not be fetched "
            f"from the hub ({in_one_line(error)})"
        ) from None
