# SPDX-License-Identifier: Apache-2.0
"""Make drafters with the Python API, and look at what they draft.

Shows: `new_drafter`, a `DrafterConfig` that is changed and checked, `save_drafter` and
`load_drafter`, and drafting in plain torch, without vLLM: `HFTarget` runs the target
and keeps its keys and values, and `BoundDrafter` drafts from them.

Run:    python examples/make_a_drafter.py
        python examples/make_a_drafter.py --out my-drafter    (keeps the second one)

Expect: two tables. The drafter that shares all layers is the target itself, so its
        first token is always the target's; its placeholders are untrained, so the rest
        is of little use. The mixed drafter shares ten layers and has two of its own:
        it is cheap to run but has learnt nothing yet. Saved and loaded, it drafts the
        same.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from vllm_mtp import (
    Drafter,
    DrafterConfig,
    DrafterOptions,
    load_drafter,
    new_drafter,
    save_drafter,
)
from vllm_mtp.data.demo_target import ensure_demo_target
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.drafter.layout import block_labels
from vllm_mtp.metrics import count_accepted
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.torch_host.texts import TextBlocks, forward_texts

PROMPT = "The water cycle has four stages. First,"
NUM_TOKENS = 4


class Text(NamedTuple):
    """The prompt with the target's own greedy continuation, and its keys and values."""

    host: HFTarget
    token_ids: torch.Tensor  # [T]
    prompt_len: int
    states: TargetStates


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the mixed drafter here")
    out: Path | None = parser.parse_args().out
    target = ensure_demo_target()
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = continue_greedily(target, tokenizer)
    print(f"the target's own text: {tokenizer.decode(text.token_ids)!r}\n")

    # 1. Every layer is the target's own, read in place.
    options = DrafterOptions(dtype="float32")
    shared = new_drafter(target, "shared:all", NUM_TOKENS, options)
    drafts = draft(shared, text)
    show("shared:all", tokenizer, text, drafts)
    exact = count_accepted(drafts, truth(text)).acceptance_per_position[0] == 1.0

    # 2. The first ten are the target's, the last two have weights of their own.
    options = DrafterOptions(dtype="float32", boundary_hidden="all", markov_rank=16)
    mixed = new_drafter(target, "shared:0-9,own:28,29", NUM_TOKENS, options)
    mixed = rebind_last_layer(mixed, target_layer=20)
    drafts = draft(mixed, text)
    show("shared:0-9,own:28,20", tokenizer, text, drafts)

    # 3. A folder gives exactly the drafter that was saved, or an error.
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_drafter(save_drafter(mixed, out or Path(scratch)))
    same = torch.equal(draft(loaded, text), drafts)
    print("drafts after saving and loading:", "the same" if same else "DIFFERENT")

    if not exact:
        print("FAILED: the first draft of shared:all must be the target's token")
    return 0 if same and exact else 1


def rebind_last_layer(drafter: Drafter, target_layer: int) -> Drafter:
    """The same weights, but the last layer reads the cache of another target layer."""
    wanted = drafter.config.model_dump()
    wanted["layers"][-1]["target_layer"] = 999
    try:
        DrafterConfig.model_validate(wanted)
    except ValidationError as error:
        print("a config is checked when made:", error.errors()[0]["msg"], "\n")
    wanted["layers"][-1]["target_layer"] = target_layer
    changed = Drafter(DrafterConfig.model_validate(wanted))
    changed.load_state_dict(drafter.state_dict())
    return changed


def continue_greedily(target: Path, tokenizer: PreTrainedTokenizerBase) -> Text:
    # float32, so that "the target's token" is not decided by a rounding.
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    token_ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    host = HFTarget(model)
    return Text(host, token_ids, prompt.input_ids.shape[1], host.encode(token_ids))


@torch.no_grad()
def draft(drafter: Drafter, text: Text) -> torch.Tensor:
    """Draft behind several prefixes of the text in one forward. ``[B, k]``."""
    bound = BoundDrafter(drafter, text.host)
    blocks = TextBlocks(text.token_ids, text.states, anchors(text))
    hidden = forward_texts(bound, [blocks], NUM_TOKENS)
    tokens, _ = bound.draft(hidden, pick_greedy)
    return tokens


def anchors(text: Text) -> torch.Tensor:
    """Where to draft: tokens of the continuation with k more behind them. ``[B]``."""
    return torch.arange(text.prompt_len, len(text.token_ids) - NUM_TOKENS, 4)


def truth(text: Text) -> torch.Tensor:
    """The target's own next tokens at these positions. ``[B, k]``."""
    return block_labels(text.token_ids, anchors(text), NUM_TOKENS)


def show(
    layers: str, tokenizer: PreTrainedTokenizerBase, text: Text, drafts: torch.Tensor
) -> None:
    counts = count_accepted(drafts, truth(text))
    print(f"{layers}: {counts.accepted_tokens} of {counts.draft_tokens} accepted")
    for position, wanted, drafted in zip(
        anchors(text), truth(text), drafts, strict=True
    ):
        after, wanted, drafted = map(
            tokenizer.decode, (text.token_ids[position], wanted, drafted)
        )
        print(f"  after {after!r:<14} the target: {wanted!r:<26} drafted: {drafted!r}")
    print()


if __name__ == "__main__":
    sys.exit(main())
