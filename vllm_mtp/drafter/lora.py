# SPDX-License-Identifier: Apache-2.0
"""LoRA on the target's own layers, gated to the placeholder rows.

The anchor's row passes unchanged, so a shared layer stays exactly the target's
there; the gating follows Apple's "Your LLM knows the future" (2507.11851).

The target's layer calls its linear modules itself and hands no gate on. So the gate is
a buffer of each changed module, and `gated` runs the layer with an argument in place of
it (``torch.func.functional_call``): nothing is kept from one forward to the next.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from vllm_mtp.drafter.config import LinearName, LoRAConfig
from vllm_mtp.drafter.shadow import shadow
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import UnsupportedTargetError

if TYPE_CHECKING:
    from vllm_mtp.drafter.host import TargetHost


class LowRankPair(nn.Module):
    """``x -> scale * B A x``. B starts at zero, so it changes nothing at first."""

    def __init__(self, sizes: tuple[int, int], config: LoRAConfig) -> None:
        super().__init__()
        in_size, out_size = sizes
        self.scale = config.alpha / config.rank
        self.a = nn.Parameter(torch.empty(config.rank, in_size))
        self.b = nn.Parameter(torch.empty(out_size, config.rank))

    def init_weights(self, generator: torch.Generator) -> None:
        bound = self.a.shape[1] ** -0.5
        nn.init.uniform_(self.a, -bound, bound, generator=generator)
        nn.init.zeros_(self.b)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """``[rows, in]`` and the gate ``[rows, 1]`` to ``[rows, out]``."""
        # A target may be divided over devices, and a pair is smaller than its rows.
        a, b, gate = (part.to(x.device) for part in (self.a, self.b, gate))
        # Gate and scale on the narrow side: it is a fraction of the output's size.
        return (x @ a.t()) * (gate * self.scale) @ b.t()


class FullRankChange(nn.Module):
    """``x -> D x``, the difference between the placeholder rows' weights and the
    target's. It starts at zero."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__()
        in_size, out_size = sizes
        self.weight = nn.Parameter(torch.empty(out_size, in_size))

    def init_weights(self, _: torch.Generator) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """``[rows, in]`` and the gate ``[rows, 1]`` to ``[rows, out]``."""
        weight, gate = self.weight.to(x.device), gate.to(x.device)
        return (x * gate) @ weight.t()


Change = LowRankPair | FullRankChange

GatedChange = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From ``[rows, in]`` and the gate ``[rows, 1]`` to ``[rows, out]``."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""From ``[rows, in]`` to ``[rows, out]``, with a weight."""


class Site(NamedTuple):
    """Where a linear module's output lies in the target's (merged) module."""

    path: str
    start: int
    size: int
    total: int  # outputs of the whole module


class GatedLinear(nn.Module):
    """A frozen linear module plus what the drafter changes on slices of its output.

    Runs only inside `gated`, which gives the buffer ``gate`` ``[rows, 1]``, 0 or 1.

    Attributes:
        branches: The drafter's changes; not registered, since the drafter owns them.
        added: What the forward adds, and where.
    """

    gate_names = ("gate",)

    def __init__(
        self,
        base: nn.Module,
        branches: list[tuple[Site, Change]],
        target: "TargetHost",
    ) -> None:
        super().__init__()
        _require_size(base, branches)
        # Where the base sums over ranks, the pairs' parts belong into the same sum.
        partial = target.without_all_reduce(base)
        self.base = base if partial is None else partial
        self.all_reduce = None if partial is None else target.all_reduce
        self.branches = branches
        self.added: list[tuple[Site, GatedChange]] = [*branches]
        self.register_buffer("gate", torch.full((1, 1), torch.nan), persistent=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Like the base module; vLLM's linears return ``(output, bias)``."""
        result = self.base(x, *args, **kwargs)
        output = result[0] if isinstance(result, tuple) else result
        for site, change in self.added:
            output.narrow(-1, site.start, site.size).add_(change(x, self.gate))
        if self.all_reduce is None:
            return result
        total = self.all_reduce(output)
        return (total, *result[1:]) if isinstance(result, tuple) else total

    @torch.no_grad()
    def merge(self, product_of: Callable[[torch.Tensor], Product]) -> None:
        """From now on, add the same by other kernels, and the low-rank pairs as one.

        Args:
            product_of: Gives the kernel of a weight ``[out, in]``, which may copy it;
                merge again when weights have changed.
        """
        pairs = [(s, c) for s, c in self.branches if isinstance(c, LowRankPair)]
        self.added = [
            (site, _full_rank_by(product_of(change.weight)))
            for site, change in self.branches
            if isinstance(change, FullRankChange)
        ]
        if not pairs:
            return
        whole = pairs[0][0]._replace(start=0, size=pairs[0][0].total)
        # All of A below each other; of B each where its slice and its rows meet.
        a = torch.cat([pair.a for _, pair in pairs])
        b = a.new_zeros(whole.size, len(a))
        start = 0
        for site, pair in pairs:
            end = start + len(pair.a)
            b[site.start : site.start + site.size, start:end] = pair.b * pair.scale
            start = end
        self.added.append((whole, _low_rank_by(product_of(a), product_of(b))))

    def __getattr__(self, name: str) -> Any:
        # vLLM's fusions ask a linear module for its quantisation: answer as
        # the base would.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def _low_rank_by(a: Product, b: Product) -> GatedChange:
    return lambda x, gate: b(a(x) * gate)


def _full_rank_by(product: Product) -> GatedChange:
    return lambda x, gate: product(x * gate)


def _require_size(base: nn.Module, branches: list[tuple[Site, Change]]) -> None:
    """An unexpected width (a shared expert?) would put changes in the wrong place."""
    site, pair = branches[0]
    narrow = pair.a if isinstance(pair, LowRankPair) else pair.weight
    expected = (narrow.shape[1], site.total)
    got = _sizes(base)
    if got != expected:
        raise UnsupportedTargetError(
            f"the target's {site.path} has (inputs, outputs) {got}, expected "
            f"{expected}; lora.modules does not fit this target's layers"
        )


def _sizes(base: nn.Module) -> tuple[int | None, int | None]:
    """Inputs and outputs of a linear module of torch or vLLM, on this rank."""

    def first(*names: str) -> int | None:
        return next((getattr(base, n) for n in names if hasattr(base, n)), None)

    return (
        first("in_features", "input_size_per_partition", "input_size"),
        first("out_features", "output_size_per_partition", "output_size"),
    )


def linear_sizes(facts: TargetFacts, name: LinearName) -> tuple[int, int]:
    """Input and output size of a layer's linear module."""
    hidden, mlp = facts.hidden_size, facts.intermediate_size or 0
    queries = facts.num_attention_heads * facts.head_dim
    keys = facts.num_key_value_heads * facts.head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }[name]


# Modules that hold several of our linear modules side by side.
_MERGED: dict[str, tuple[LinearName, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def with_lora(
    layer: nn.Module,
    pairs: Iterable[tuple[LinearName, Change]],
    facts: TargetFacts,
    target: "TargetHost",
    *,
    keys_are_values: bool = False,
) -> nn.Module:
    """A shadow of ``layer`` whose named linear modules carry the pairs.

    Args:
        layer: The target's; left as it is.
        pairs: By the linear module that they change.
        facts: The target's shape, on this rank.
        target: The layer's host.
        keys_are_values: See `TargetHost`; the pair of ``k_proj`` then changes both, as
            it does where one module gives both.

    Raises:
        UnsupportedTargetError: The layer has no such module.
    """
    by_path: dict[str, list[tuple[Site, Change]]] = {}
    for name, pair in pairs:
        site = _find_site(layer, name, facts)
        branches = by_path.setdefault(site.path, [])
        branches.append((site, pair))
        if name == "k_proj" and keys_are_values:
            branches.append((_find_site(layer, "v_proj", facts), pair))
    changed: Any = shadow(
        layer,
        {
            path: GatedLinear(layer.get_submodule(path), branches, target)
            for path, branches in by_path.items()
        },
    )
    changed.gate_names = [f"{path}.gate" for path in by_path]
    return changed


def gated(layer: nn.Module, gate: torch.Tensor) -> Callable[..., Any]:
    """``layer``'s forward, its `GatedLinear` modules acting on the rows of ``gate``.

    Args:
        layer: What `with_lora` gave.
        gate: ``[rows, 1]``, 0 or 1.
    """
    gates = dict.fromkeys(layer.gate_names, gate)  # type: ignore[arg-type]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return functional_call(layer, gates, args, kwargs, tie_weights=False)

    return forward


def _find_site(layer: nn.Module, name: LinearName, facts: TargetFacts) -> Site:
    paths = {path.rpartition(".")[2]: path for path, _ in layer.named_modules()}
    if name in paths:
        size = linear_sizes(facts, name)[1]
        return Site(paths[name], 0, size, size)
    for merged, parts in _MERGED.items():
        if name in parts and merged in paths:
            sizes = [linear_sizes(facts, part)[1] for part in parts]
            index = parts.index(name)
            start = sum(sizes[:index])
            return Site(paths[merged], start, sizes[index], sum(sizes))
    raise UnsupportedTargetError(
        f"LoRA names module {name!r}, but the target's {type(layer).__name__} has "
        f"none of that name (it has {sorted(p for p in paths if p)}); make a "
        "drafter whose lora.modules fit this target"
    )
