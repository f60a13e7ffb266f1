# SPDX-License-Identifier: Apache-2.0
"""The ledger: every place where vLLM is patched, and nothing else.

The first is applied when vLLM loads its plugins. The one about requests is applied
where our config is built. The others are applied in a process that runs our method,
as late as the module they belong to is loaded and as early as the runner asks which
drafter to build; nobody else pays for them.

Most are there because vLLM has no registry of speculative methods. Where it has the one
that we propose (docs/upstream/plugin-methods.md), they are left out: `plugin.register`
registers the method, and vLLM finds the rest in `registered.py`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_mtp.errors import MTPError
from vllm_mtp.serving import versions

_ORIGINAL = "__vllm_mtp_original__"
_REGISTERS = ["method", "config_cls"]
_PROPOSAL = "docs/upstream/plugin-methods.md"


class HookMissingError(MTPError):
    """vLLM lacks, or has changed, a symbol that a patch needs."""


@dataclass(frozen=True)
class Patch:
    """One patched symbol.

    Attributes:
        name: Short name, as `vllm-mtp doctor` shows it.
        symbol: ``module:attribute`` or ``module:Class.attribute``.
        aliases: Modules that imported the symbol by name.
        parameters: Parameters of the original that we rely on.
        wrapper: ``module:function`` that makes the replacement from the original.
        what: What the replacement does.
        why: Why no extension point of vLLM serves.
        remove_when: When this entry can go.
        cpu_only: Applies on the CPU platform only.
        fixed_in: First release of vLLM that needs it no more, and would be wrong with
            it.
        only_with: Of vLLM's config, without which nobody needs it.
        until_says: What the original says where vLLM does the same itself.
        until_registry: Stands in for the registry of methods that we propose to vLLM.
    """

    name: str
    symbol: str
    parameters: tuple[str, ...]
    wrapper: str
    what: str
    why: str
    remove_when: str
    aliases: tuple[str, ...] = ()
    cpu_only: bool = False
    fixed_in: str | None = None
    until_registry: bool = False
    only_with: str | None = None
    until_says: str | None = None

    @property
    def seen(self) -> str:
        """vLLM releases in which it was read and run, as ``0.28-0.33``."""
        return versions.range_with(self.name)


CONFIG = Patch(
    name="config",
    symbol="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    parameters=("self", "target_model_config", "target_parallel_config"),
    wrapper="vllm_mtp.serving.hooks:create_speculative_config",
    what="Builds our SpeculativeConfig subclass for method 'mtp_placeholder'; "
    "every other request falls through unchanged.",
    why="SpeculativeConfig.method is a closed Literal, and there is no registry "
    "of methods.",
    remove_when=f"vLLM takes speculative methods from plugins ({_PROPOSAL}).",
    until_registry=True,
)
V1_PROPOSER = Patch(
    name="v1-proposer",
    symbol="vllm.v1.spec_decode.draft_model:DraftModelProposer.__new__",
    parameters=(),
    wrapper="vllm_mtp.serving.hooks:new_draft_model_proposer",
    what="Makes our proposer where the V1 runner builds the stock one, when the "
    "config is ours.",
    why="The V1 runner picks proposers by an if-chain on the method's name and "
    "asserts their class; ours is a subclass.",
    remove_when="The V1 runner is gone, or takes proposers from plugins "
    f"({_PROPOSAL}).",
    until_registry=True,
)
V2_SPECULATOR = Patch(
    name="v2-speculator",
    symbol="vllm.v1.worker.gpu.spec_decode:init_speculator",
    parameters=("vllm_config", "device"),
    wrapper="vllm_mtp.serving.hooks:init_speculator",
    what="Makes our speculator where the V2 runner builds the stock one, when the "
    "config is ours.",
    why="The V2 runner picks speculators by an if-chain on the method's name.",
    remove_when=f"vLLM takes speculators from plugins ({_PROPOSAL}).",
    until_registry=True,
    aliases=("vllm.v1.worker.gpu.model_runner",),
)
V2_ADAPTER_ROWS = Patch(
    name="v2-adapter-rows",
    symbol="vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs",
    parameters=("self",),
    wrapper="vllm_mtp.serving.hooks:prepare_inputs",
    what="Tells the kernels of LoRA adapters which adapter each row of logits has, "
    "where a step verifies drafts.",
    why="vLLM tells them of one row per request. With drafts there are more, so an "
    "adapter on the LM head is given to rows of other requests, or ends the engine "
    "(docs/upstream/).",
    remove_when="`LoraState.make_lora_inputs` counts the rows of drafts.",
    only_with="lora_config",
)
V1_LATE_DRAFTS = Patch(
    name="v1-late-drafts",
    symbol="vllm.v1.worker.gpu_model_runner:GPUModelRunner.take_draft_token_ids",
    parameters=("self",),
    wrapper="vllm_mtp.serving.hooks:take_draft_token_ids",
    what="Lets our proposer draft when the engine fetches the drafts, which is after "
    "it has sent the step's tokens on their way.",
    why="On a CPU a draft runs in the runner's own thread. vLLM asks for it before the "
    "tokens just sampled leave the runner, and so it would be felt in the time to the "
    "first token.",
    remove_when="The V1 runner is gone, or drafts after it has given its output "
    f"({_PROPOSAL}).",
    cpu_only=True,
    until_says="late_drafts",
)
V1_NO_DRAFTS = Patch(
    name="v1-no-drafts",
    symbol="vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
    parameters=("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
    wrapper="vllm_mtp.serving.hooks:sample_or_verify",
    what="Samples as without speculation in a step that verifies no draft.",
    why="vLLM goes through its rejection sampler even then, which copies the logits "
    "and takes up to a tenth of a step, so that drafting nothing would cost something.",
    remove_when="The V1 runner is gone, or takes its plain sampler for such a step "
    f"({_PROPOSAL}).",
    cpu_only=True,
    until_says="metadata.max_spec_len == 0",
)
CPU_SAMPLING = Patch(
    name="cpu-sampling",
    symbol="vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
    parameters=("logits", "cu_num_draft_tokens", "sampling_metadata"),
    wrapper="vllm_mtp.serving.hooks:apply_sampling_constraints",
    what="Applies temperature, top-k and top-p to draft tokens with plain torch, and "
    "nothing where a step verifies no draft.",
    why="vLLM's CPU stand-in writes into a temporary copy, so sampled requests are "
    "verified with uninitialised temperatures; and a request with top-k alone ends "
    "the engine in a step without drafts (docs/upstream/).",
    remove_when="vLLM's CPU `_expand_kernel_impl` writes its output, and "
    "`apply_top_k_only` takes no rows.",
    cpu_only=True,
)
CPU_GDN = Patch(
    name="cpu-gdn",
    symbol="vllm.model_executor.layers.mamba.ops.cpu.gdn_attention:_spec_forward",
    parameters=("layer", "attn_metadata_i", "conv_buf", "ssm_state", "state_len"),
    wrapper="vllm_mtp.serving.hooks:spec_forward",
    what="Lets linear-attention layers take up their state behind the accepted tokens "
    "also where a step verified fewer drafts than it could, or than the one before.",
    why="vLLM's CPU code looks for that state where it is after a step with all "
    "drafts: with fewer, verified tokens differ from the target's, or the engine ends "
    "(docs/upstream/).",
    remove_when="0.33 is the oldest vLLM that is supported; it needs no patch.",
    cpu_only=True,
    fixed_in="0.33.0",
)
V1_THINKING = Patch(
    name="v1-thinking",
    symbol="vllm.v1.sample.thinking_budget_state:"
    "maybe_create_thinking_budget_state_holder",
    parameters=("reasoning_config", "max_num_seqs", "num_spec_tokens"),
    wrapper="vllm_mtp.serving.hooks:thinking_budgets",
    what="Ends thinking behind the same token as without speculation, where a request "
    "has a thinking_token_budget.",
    why="vLLM guesses the row of a step that ends the thinking. With drafts, budgets "
    "are passed or cut short, and other requests of the batch get tokens that were "
    "forced for their neighbour (docs/upstream/).",
    remove_when="The V1 runner is gone, or vLLM counts for each row (vllm#39573).",
    only_with="reasoning_config",
    aliases=("vllm.v1.worker.gpu_input_batch",),
)
REQUESTS = Patch(
    name="requests",
    symbol="vllm.sampling_params:SamplingParams._validate_spec_decode",
    parameters=("self", "speculative_config"),
    wrapper="vllm_mtp.serving.hooks:validate_spec_decode",
    what="Refuses a request with logprob_token_ids, or with a number of drafts that it "
    "cannot have, when it is added, where the config is ours.",
    why="vLLM takes such a request, and its rejection samplers do not know the "
    "parameter: on V1 one request ends the engine for all, on both runners logprobs "
    "are lost. Of vllm_xargs, vLLM knows nothing. No plugin is asked about a request.",
    remove_when="vLLM answers or refuses the former itself (vllm#42592), and asks "
    f"plugins about requests ({_PROPOSAL}).",
    until_registry=True,
)
PATCHES = (
    CONFIG,
    REQUESTS,
    V1_PROPOSER,
    V1_LATE_DRAFTS,
    V1_NO_DRAFTS,
    V1_THINKING,
    V2_SPECULATOR,
    V2_ADAPTER_ROWS,
    CPU_SAMPLING,
    CPU_GDN,
)

# Names of patches that are applied in this process, or that it does not need.
_settled: set[str] = set()


def install_at_start() -> None:
    """Apply what must be there before vLLM reads its arguments."""
    _install_if_needed(CONFIG)


def install_for_requests() -> None:
    """Apply what must be there before a request is added, in the process that does."""
    _install_if_needed(REQUESTS)


def install_for_runner(vllm_config: Any = None) -> None:
    """Apply what the runner of this process needs, for modules already loaded.

    Called by our config until the runner has its drafter, by that, and once more behind
    the target's modules.

    Args:
        vllm_config: The runner's; None where it is not known yet.
    """
    for patch in PATCHES:
        if patch.only_with and not getattr(vllm_config, patch.only_with, None):
            continue
        if patch.name in _settled or _split(patch.symbol)[0] not in sys.modules:
            continue
        _install_if_needed(patch)
        _settled.add(patch.name)


def vllm_registry() -> Callable[[str, str], None] | None:
    """What registers a method's name and the qualified name of its config class; None
    where vLLM has no such registry."""
    try:
        module = importlib.import_module("vllm.v1.spec_decode.registry")
    except ImportError:
        return None
    register = getattr(module, "register_speculative_method", None)
    if register is None or [*inspect.signature(register).parameters] != _REGISTERS:
        return None  # another one than we know
    return register


def is_outdated(patch: Patch) -> bool:
    """Whether this vLLM can do without the patch."""
    if patch.fixed_in is not None and not versions.is_older_than(patch.fixed_in):
        return True
    if patch.until_says is not None and patch.until_says in _source_of(patch):
        return True
    return patch.until_registry and vllm_registry() is not None


def _source_of(patch: Patch) -> str:
    """Of the original; empty where it cannot be read or is not there."""
    try:
        owner, attribute = _owner(patch)
        return inspect.getsource(inspect.unwrap(getattr(owner, attribute)))
    except (AttributeError, HookMissingError, ImportError, OSError, TypeError):
        return ""


def install(patch: Patch) -> None:
    """Apply one patch; does nothing where it already is.

    Raises:
        HookMissingError: The symbol is gone or has another signature.
    """
    owner, attribute = _owner(patch)
    current = inspect.getattr_static(owner, attribute, None)
    if is_installed(patch):
        return
    _require_parameters(patch, current)
    module, function = _split(patch.wrapper)
    make: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    replacement = make(current)
    setattr(replacement, _ORIGINAL, current)
    setattr(owner, attribute, replacement)
    for alias in patch.aliases:
        if alias in sys.modules:
            setattr(sys.modules[alias], attribute, replacement)


def is_installed(patch: Patch) -> bool:
    """Whether the patch is in place in this process (also below other wrappers)."""
    owner, attribute = _owner(patch)
    current = inspect.getattr_static(owner, attribute, None)
    while current is not None:
        current = getattr(current, "__func__", current)  # a staticmethod
        if hasattr(current, _ORIGINAL):
            return True
        current = getattr(current, "__wrapped__", None)
    return False


def problem_with(patch: Patch) -> str | None:
    """Why the patch cannot be applied to this vLLM; None when it can."""
    try:
        owner, attribute = _owner(patch)
        if not is_installed(patch):
            _require_parameters(patch, inspect.getattr_static(owner, attribute, None))
    except (HookMissingError, ImportError) as error:
        return str(error)
    return None


def _split(symbol: str) -> tuple[str, str]:
    module, _, attribute = symbol.partition(":")
    return module, attribute


def _owner(patch: Patch) -> tuple[Any, str]:
    """The module or class that holds the symbol, and the attribute's name."""
    module, path = _split(patch.symbol)
    owner: Any = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
    if owner is None:
        raise HookMissingError(_missing(patch, "it is not there"))
    return owner, attribute


def _require_parameters(patch: Patch, current: Any) -> None:
    if _is_inherited(patch):
        return
    if current is None:
        raise HookMissingError(_missing(patch, "it is not there"))
    found = inspect.signature(current).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in found.values()):
        return  # another plugin's wrapper, which hands on whatever it gets
    if gone := [name for name in patch.parameters if name not in found]:
        raise HookMissingError(
            _missing(patch, f"it has no parameter {', '.join(gone)} any more")
        )


def _is_inherited(patch: Patch) -> bool:
    """``__new__`` comes from object: there is no signature to check."""
    return patch.symbol.endswith(".__new__")


def _missing(patch: Patch, reason: str) -> str:
    from importlib.metadata import version

    return (
        f"vllm-mtp {version('vllm-mtp')} cannot use {patch.symbol}: {reason}. It was "
        f"seen in vLLM {patch.seen}. Install one of these, or a newer vllm-mtp."
    )


def _install_if_needed(patch: Patch) -> None:
    if is_outdated(patch):
        return
    if patch.cpu_only:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
    install(patch)
