# SPDX-License-Identifier: Apache-2.0
"""Settings of a new drafter that nothing in it would use: refused, since whoever wrote
them expects another drafter than the one that would be made."""

import re
from collections.abc import Iterable

from vllm_mtp.drafter.options import DrafterOptions
from vllm_mtp.errors import MTPError

_NO_OWN = "no layer is an own one", "list some (own:0)"
_NO_MLP = "no layer is an MLP layer", "list some (mlp:1)"
_ONE = "num_speculative_tokens is 1", "ask for more tokens"


def require_used(
    options: DrafterOptions, layers: Iterable[str], num_speculative_tokens: int
) -> None:
    """Refuse what has no effect on the drafter.

    Args:
        options: What was asked for.
        layers: The layer list, and those of stages before it: what one of them uses
            is used.
        num_speculative_tokens: k.

    Raises:
        MTPError: Names the first setting, what was got, and what to do.
    """
    kinds = {k for text in layers for k in re.findall(r"\b(shared|own|mlp):", text)}
    attends = bool(kinds & {"shared", "own"})
    reads = "shared" in kinds or ("own" in kinds and options.own_attention == "prefix")
    one = num_speculative_tokens == 1
    # Rows with placeholders, on which alone changes of shared layers act.
    changed = options.input == "boundary" or not one
    rows = options.extra_rows and options.block_mask == "bidirectional"
    no_rows = "no layer attends, so no row reads another", "list shared or own layers"
    rules: tuple[tuple[str, bool, tuple[str, str]], ...] = (
        ("mlp_form", "mlp" in kinds, _NO_MLP),
        ("mlp_size", "mlp" in kinds, _NO_MLP),
        ("own_attention", "own" in kinds, _NO_OWN),
        ("own_init", "own" in kinds, _NO_OWN),
        ("bridges", "own" in kinds, _NO_OWN),
        ("boundary_hidden", "own" in kinds, _NO_OWN),
        (
            "per_position",
            bool(kinds & {"own", "mlp"}),
            ("all layers are shared ones", "list own or MLP layers"),
        ),
        *(
            (name, "shared" in kinds, ("no layer is a shared one", "list some"))
            for name in ("lora_rank", "full_rank_modules")
        ),
        *(
            # A rank of 0 switches off what a file of settings has.
            (name, options.lora_rank is not None, ("lora_rank is none", "write one"))
            for name in ("lora_alpha", "lora_modules")
        ),
        (
            "prefix_window",
            reads,
            ("no layer reads the prefix", "list shared layers, or own ones that do"),
        ),
        ("extra_rows", attends, no_rows),
        ("block_mask", attends, no_rows),
        ("lora_rank", changed, _ONE),
        ("full_rank_modules", changed, _ONE),
        ("markov_rank", not one, _ONE),
        ("placeholder_kind", not one, _ONE),
        ("extra_rows", bool(not one or rows), _ONE),
        ("block_mask", bool(not one or rows), _ONE),
    )
    default = DrafterOptions()
    for name, is_used, (why, do) in rules:
        value = getattr(options, name)
        if not is_used and value and value != getattr(default, name):
            raise MTPError(
                f"{name}: got {value!r}, but {why}, so it would change nothing; leave "
                f"it out, or {do}"
            )
    _require_rows_that_differ(options, attends, one, sorted(kinds))


def _require_rows_that_differ(
    options: DrafterOptions, attends: bool, one: bool, kinds: list[str]
) -> None:
    """A placeholder that reads nothing drafts the same behind every text. The anchor's
    row, and tokens that a Markov correction goes by, are of the text."""
    alone = options.input == "block" and not options.chain
    if kinds and alone and not (attends or one or options.markov_rank):
        raise MTPError(
            "layers: got MLP layers alone, in which placeholders read nothing of the "
            "text and would draft the same tokens behind all; expected input: "
            "boundary, chain, markov_rank, a layer that attends, or "
            "num_speculative_tokens: 1"
        )
