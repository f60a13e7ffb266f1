# SPDX-License-Identifier: Apache-2.0
"""What our code needs of vLLM, checked against vLLM's sources without running them.

Most of it is read from our own modules: what they import, which attributes and methods
of vLLM's classes they use, how they call and override. The rest cannot be seen there,
and is listed below.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from tests.serving.source_tree import (
    Calls,
    Found,
    Function,
    Signature,
    SourceTree,
    assigned_to_self,
    signature,
)
from vllm_mtp.serving import ledger
from vllm_mtp.serving.settings import ALLOWED_KEYS
from vllm_mtp.serving.versions import Release

PACKAGE = Path(ledger.__file__).parents[1]
USERS = (*sorted((PACKAGE / "serving").glob("*.py")), PACKAGE / "engine.py")
# Modules (v2.py, v2_*.py) that are imported only where a ledger entry applies.
NEEDED_BY = {"v1": "v1-proposer", "v2": "v2-speculator"}


def constant(file: str, name: str) -> tuple[str, ...]:
    """A constant of a serving module, read without importing vLLM."""
    for node in ast.parse((PACKAGE / "serving" / file).read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return tuple(ast.literal_eval(node.value))
    raise LookupError(f"{file} has no constant {name}")


# Attributes that our code reads where no annotation tells the class.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vllm.config:ModelConfig": (
        *("dtype", "enable_prompt_embeds", "hf_config", "max_model_len", "model"),
        *("is_moe", "uses_mrope", "enable_sleep_mode"),
        "sleep_preserve_parameter_names",
    ),
    "vllm.config:ParallelConfig": (
        *constant("refusals.py", "_PARALLEL_SIZES"),
        *("data_parallel_size", "world_size", "worker_extension_cls"),
    ),
    "vllm.config:SchedulerConfig": ("async_scheduling",),
    "vllm.config:SpeculativeConfig": ALLOWED_KEYS,
    "vllm.engine.arg_utils:EngineArgs": (
        *constant("refusals.py", "_REFUSED_SETTINGS"),
        *("speculative_config", "spec_method", "spec_model", "spec_tokens"),
    ),
    "vllm.model_executor.layers.attention:Attention": (
        *("layer_name", "num_heads", "num_kv_heads", "head_size"),
        "kv_sharing_target_layer_name",
    ),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": (
        *("scale", "soft_cap", "head_dtype"),
    ),
    # Set by us and read by the base class.
    "vllm.v1.spec_decode.draft_model:DraftModelProposer": (
        *("_draft_attn_layer_names", "_last_draft_probs"),
    ),
    # How a request ends, as far as the worker knows.
    "vllm.sampling_params:SamplingParams": (
        *("all_stop_token_ids", "ignore_eos", "max_tokens", "stop_token_ids"),
        *("extra_args", "logprob_token_ids"),
    ),
    # Which keeps the parameters of a draft model, as "draft.*".
    "vllm.v1.worker.gpu_worker:Worker": ("_get_sleep_parameters",),
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": (
        *("output_token_ids", "prompt_token_ids", "sampling_params"),
    ),
    "vllm.v1.worker.gpu_input_batch:InputBatch": ("block_table", "req_ids"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        *("drafter", "input_batch", "requests", "_draft_token_ids"),
    ),
    "vllm.v1.worker.block_table:BlockTable": ("block_size", "get_device_tensor"),
    "vllm.v1.worker.utils:AttentionGroup": (
        *("create_metadata_builders", "get_metadata_builder"),
        *("kv_cache_group_id", "kv_cache_spec", "layer_names"),
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder": ("build_for_drafting",),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ("layer_names", "kv_cache_spec"),
    "vllm.v1.kv_cache_interface:KVCacheSpec": ("block_size",),
}
V2_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    # Whose tables are copied without what a window leaves out.
    "vllm.v1.worker.gpu.block_table:BlockTables": ("input_block_tables",),
    "vllm.config.attention:AttentionConfig": ("use_non_causal",),
    "vllm.v1.attention.backend:AttentionBackend": ("get_name", "supports_non_causal"),
    "vllm.v1.worker.utils:AttentionGroup": ("backend", "metadata_builders"),
}
# Methods of our classes that no base class has; all other public ones override.
OWN_METHODS = {"late_drafts", "replace_weights"}
# Settings that older releases do not know: there is nothing to refuse.
SINCE = {
    "watermark_config": Version("0.31.0"),
    "sleep_preserve_parameter_names": Version("0.31.0"),
    "_get_sleep_parameters": Version("0.32.0"),
    "_maybe_predict_acceptance": Version("0.32.0"),
}
# Calls through objects whose class no annotation tells, and the runner's call of the
# constructor that we inherit: (symbol, positional arguments, keywords).
CALLS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("vllm.model_executor.layers.attention:Attention.forward", 3, ()),
    ("vllm.model_executor.models.llama:LlamaForCausalLM.embed_input_ids", 1, ()),
    ("vllm.model_executor.models.llama:LlamaForCausalLM.compute_logits", 1, ()),
    (
        "vllm.model_executor.models.llama:LlamaDecoderLayer.forward",
        0,
        ("positions", "hidden_states", "residual"),
    ),
    (
        "vllm.model_executor.models.qwen3:Qwen3DecoderLayer.forward",
        0,
        ("positions", "hidden_states", "residual"),
    ),
    (
        "vllm.v1.spec_decode.draft_model:DraftModelProposer.__init__",
        0,
        ("vllm_config", "device", "runner"),
    ),
)
V2_CALLS = (
    (
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.set_attn",
        *(5, ()),
    ),
)
# (function, call, call): the second comes after the first; or one call, named twice.
ORDER: tuple[tuple[str, str, str], ...] = (
    # The plugin is there before the user's settings are read.
    (
        "vllm.engine.arg_utils:EngineArgs.__post_init__",
        *("load_general_plugins", "load_general_plugins"),
    ),
    (
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        *("create_speculative_config", "create_speculative_config"),
    ),
    # The runner asks the config before it builds a drafter: then we patch.
    (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.__init__",
        *("uses_draft_model", "DraftModelProposer"),
    ),
    # Scratch slots are reserved for this family of methods.
    (
        "vllm.config:VllmConfig.num_lookahead_tokens",
        *("uses_draft_model", "uses_draft_model"),
    ),
)
V2_ORDER = (
    (
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.__init__",
        *("use_dspark", "init_speculator"),
    ),
)
# (function, what it must say, the ledger entry that is about it).
TEXTS: tuple[tuple[str, str, str], ...] = (
    # The family "ngram" takes the target's configs for the draft's.
    (
        "vllm.config:SpeculativeConfig.__post_init__",
        "self.draft_model_config = self.target_model_config",
        "config",
    ),
    # Late drafts take the place of the lists that stood for them until then.
    (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_draft_token_ids_cpu",
        "isinstance(self._draft_token_ids, list)",
        "v1-late-drafts",
    ),
    (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.take_draft_token_ids",
        "self._get_draft_token_ids_cpu()",
        "v1-late-drafts",
    ),
    # Every request is looked at with the engine's config.
    (
        "vllm.sampling_params:SamplingParams.verify",
        "self._validate_spec_decode(speculative_config)",
        "requests",
    ),
    # The fault that is repaired: without it, the entry does not apply any more.
    (
        "vllm.utils.cpu_triton_utils:_expand_kernel_impl",
        "_ensure_int64(output)",
        "cpu-sampling",
    ),
)
_ATTENTION = "vllm.model_executor.layers.attention"
# Attention layers call a connector only where this has one: a draft takes it away.
TEXTS_OF_ALL = (
    (
        f"{_ATTENTION}.kv_transfer_utils:maybe_transfer_kv_layer",
        "if not has_kv_transfer_group()",
    ),
    (
        "vllm.distributed.kv_transfer.kv_transfer_state:has_kv_transfer_group",
        "return _KV_CONNECTOR_AGENT is not None",
    ),
)
# Connectors that no CPU can run: they learn of blocks from the scheduler alone, and
# layers tell them nothing.
_V1_CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1"
SILENT_LAYERS = (
    *(f"{_V1_CONNECTORS}.nixl:Nixl{kind}Connector" for kind in ("Pull", "Push")),
    f"{_V1_CONNECTORS}.offloading_connector:OffloadingConnector",
)
LAYER_HOOKS = ("wait_for_layer_load", "save_kv_layer")


def problems(tree: SourceTree, release: Release) -> list[str]:
    """Everything that our code needs and this vLLM does not have."""
    found: list[str] = []
    for patch in ledger.PATCHES:
        if patch.name in release.hooks:
            found += _patch_problems(tree, patch)
    for user in USERS:
        needed_by = NEEDED_BY.get(user.stem.partition("_")[0])
        if needed_by is None or needed_by in release.hooks:
            found += OurModule(user, tree).problems()
    found += _attribute_problems(tree, release)
    found += _call_and_order_problems(tree, _has_v2(release))
    found += _text_problems(tree, release)
    found += _connector_problems(tree)
    found += _v2_problems(tree, release)
    return sorted(set(found))


def _has_v2(release: Release) -> bool:
    return "v2-speculator" in release.hooks


def _patch_problems(tree: SourceTree, patch: ledger.Patch) -> Iterator[str]:
    if patch.symbol.endswith(".__new__"):  # inherited from object
        owner = tree.find(patch.symbol.removesuffix(".__new__"))
        if owner is None or tree.member(owner, "__new__"):
            yield f"{patch.symbol}: the class is gone, or has a __new__ of its own"
        return
    found = tree.find(patch.symbol)
    if found is None or not isinstance(found.node, Function):
        yield f"{patch.symbol}: no such function"
        return
    if gone := set(patch.parameters) - set(signature(found.node).names):
        yield f"{patch.symbol}: takes no {', '.join(sorted(gone))}"
    for alias in patch.aliases:
        attribute = patch.symbol.rpartition(":")[2]
        if tree.find(f"{alias}:{attribute}") != found:
            yield f"{alias}: does not import {attribute}"


def _attribute_problems(tree: SourceTree, release: Release) -> Iterator[str]:
    number = Version(release.version)
    expected = ATTRIBUTES | (V2_ATTRIBUTES if _has_v2(release) else {})
    for symbol, names in expected.items():
        owner = tree.find(symbol)
        there = set() if owner is None else tree.attributes(owner)
        for name in names:
            if name not in there and number >= SINCE.get(name, number):
                yield f"{symbol}: has no {name}"


def _call_and_order_problems(tree: SourceTree, has_v2: bool) -> Iterator[str]:
    for symbol, count, keywords in CALLS + (V2_CALLS if has_v2 else ()):
        call = ast.Call(
            func=ast.Name(symbol),
            args=[ast.Name("x")] * count,
            keywords=[ast.keyword(name, ast.Name("x")) for name in keywords],
        )
        yield from _call_problems(tree, symbol, call)
    for symbol, first, second in ORDER + (V2_ORDER if has_v2 else ()):
        found = tree.find(symbol)
        if found is None or not Calls(found.node).in_order(first, second):
            yield f"{symbol}: does not call {first}, then {second}"


def _text_problems(tree: SourceTree, release: Release) -> Iterator[str]:
    for symbol, text, hook in TEXTS:
        found = tree.find(symbol)
        says = found is not None and text in ast.unparse(found.node)
        if hook in release.hooks and not says:
            yield f"{symbol}: does not say {text!r} (see the hook {hook})"


def _connector_problems(tree: SourceTree) -> Iterator[str]:
    for symbol, text in TEXTS_OF_ALL:
        found = tree.find(symbol)
        if found is None or text not in ast.unparse(found.node):
            yield f"{symbol}: does not say {text!r}"
    for symbol in SILENT_LAYERS:
        owner = tree.find(symbol)
        for name in LAYER_HOOKS:
            hook = owner and tree.member(owner, name)
            if not hook or not _does_nothing(hook.node):
                yield f"{symbol}: {name} does something, or is not there"


def _does_nothing(function: ast.AST) -> bool:
    """Nothing but a docstring and ``pass``."""
    assert isinstance(function, Function)
    return all(
        isinstance(node, ast.Pass | ast.Expr)
        and isinstance(getattr(node, "value", ast.Constant("")), ast.Constant)
        for node in function.body
    )


def _v2_problems(tree: SourceTree, release: Release) -> Iterator[str]:
    """Whether V2 takes methods of our family in just the releases of the table."""
    symbol = ledger.V2_SPECULATOR.symbol
    found = tree.find(symbol)
    takes = found is not None and "uses_draft_model" in Calls(found.node).lines
    if takes != _has_v2(release):
        yield f"{symbol}: takes draft models: {takes}; the table says otherwise"


def _call_problems(tree: SourceTree, symbol: str, call: ast.Call) -> Iterator[str]:
    found = tree.find(symbol)
    if found is None:
        yield f"{symbol}: not there"
        return
    takes = _signature_of(tree, found, bound="." in symbol.partition(":")[2])
    if takes and (problem := takes.problem_with_call(call)):
        yield f"{symbol}: {problem}"


def _signature_of(tree: SourceTree, found: Found, *, bound: bool) -> Signature | None:
    if isinstance(found.node, ast.ClassDef):
        return tree.constructor(found)
    if isinstance(found.node, Function):
        static = any(
            "staticmethod" in ast.unparse(d) for d in found.node.decorator_list
        )
        return signature(found.node, bound=bound and not static)
    return None


class OurModule:
    """One of our modules, and vLLM as it sees it."""

    def __init__(self, path: Path, tree: SourceTree) -> None:
        self._name = path.name
        self._code = ast.parse(path.read_text("utf-8"))
        self._tree = tree
        # Local name: vLLM's symbol.
        self.imports = {
            alias.asname or alias.name: f"{node.module}:{alias.name}"
            for node in ast.walk(self._code)
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").partition(".")[0] == "vllm"
            for alias in node.names
        }

    def problems(self) -> list[str]:
        """What the module needs and this vLLM does not have."""
        found = [
            f"{symbol}: not there"
            for symbol in self.imports.values()
            if self._tree.find(symbol) is None
        ]
        for node in ast.walk(self._code):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found += self._call(node.func.id, node)
            elif isinstance(node, Function):
                found += self._annotated(node)
            elif isinstance(node, ast.ClassDef):
                found += self._derived(node)
        return [f"{self._name}: {problem}" for problem in found]

    def _call(self, name: str, call: ast.Call) -> Iterator[str]:
        if symbol := self.imports.get(name):
            yield from _call_problems(self._tree, symbol, call)

    def _annotated(self, function: Function) -> Iterator[str]:
        """Attributes of parameters whose class is named."""
        for argument in (*function.args.args, *function.args.kwonlyargs):
            name = argument.annotation and ast.unparse(argument.annotation)
            symbol = self.imports.get(name or "")
            owner = symbol and self._tree.find(symbol)
            if not owner or not isinstance(owner.node, ast.ClassDef):
                continue
            there = self._tree.attributes(owner)
            used = _uses_of(argument.arg, function) - {"replace"}
            for name in sorted((used | _replaced(argument.arg, function)) - there):
                yield f"{symbol}: has no {name}"

    def _derived(self, ours: ast.ClassDef) -> Iterator[str]:
        """A class of ours that derives from one of vLLM's."""
        for base in ours.bases:
            symbol = self.imports.get(ast.unparse(base))
            owner = symbol and self._tree.find(symbol)
            if owner:
                yield from self._inherited(ours, symbol or "", owner)
                yield from self._overridden(ours, symbol or "", owner)

    def _inherited(self, ours: ast.ClassDef, symbol: str, base: Found) -> Iterator[str]:
        """What we use of the base class, and do not define ourselves."""
        there = self._tree.attributes(base)
        own = _defined(ours)
        for name in sorted(_uses_of("self", ours) - own - there):
            yield f"{symbol}: has no {name}"
        for node in ast.walk(ours):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                receiver, method = ast.unparse(node.func.value), node.func.attr
                inherited = receiver == "self" and method in there - own
                if inherited or receiver == "super()":
                    yield from _call_problems(self._tree, f"{symbol}.{method}", node)

    def _overridden(
        self, ours: ast.ClassDef, symbol: str, base: Found
    ) -> Iterator[str]:
        for node in ours.body:
            if not isinstance(node, Function) or node.name == "__init__":
                continue
            name = f"{symbol}.{node.name}"
            theirs = self._tree.member(base, node.name)
            if theirs is not None and isinstance(theirs.node, Function):
                yield from _override_problems(name, node, theirs.node)
            elif theirs is None and not node.name.startswith(("_", *OWN_METHODS)):
                yield f"{symbol}: has no {node.name} to override"


def _defined(ours: ast.ClassDef) -> set[str]:
    """Methods, annotated names, and private attributes that the class sets.

    A public attribute that it sets is one of the base class, which reads it.
    """
    names = {node.name for node in ours.body if isinstance(node, Function)}
    for node in ours.body:
        if isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
    return names | {name for name in assigned_to_self(ours) if name.startswith("_")}


def _override_problems(symbol: str, ours: Function, theirs: Function) -> Iterator[str]:
    """Whether our method takes what vLLM gives to its own."""
    mine, base = signature(ours, bound=True), signature(theirs, bound=True)
    common = min(len(mine.positional), len(base.positional))
    if mine.positional[:common] != base.positional[:common]:
        yield f"{symbol}: its parameters are {', '.join(base.positional)}"
    if not mine.takes_more_keywords and (new := set(base.names) - set(mine.names)):
        yield f"{symbol}: is called with {', '.join(sorted(new))}"
    if gone := mine.required - set(base.names):
        yield f"{symbol}: is not called with {', '.join(sorted(gone))}"


def _uses_of(name: str, node: ast.AST) -> set[str]:
    """Attributes read from a name."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.value, ast.Name)
        and part.value.id == name
    }


def _replaced(name: str, node: ast.AST) -> set[str]:
    """Fields that ``name.replace(field=...)`` sets."""
    return {
        keyword.arg
        for part in ast.walk(node)
        if isinstance(part, ast.Call) and ast.unparse(part.func) == f"{name}.replace"
        for keyword in part.keywords
        if keyword.arg
    }
