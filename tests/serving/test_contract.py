# SPDX-License-Identifier: Apache-2.0
"""The vLLM on the path has what our code needs, by its sources alone.

Nothing here imports vLLM. `make test-versions` runs these tests with other releases.
"""

import importlib.util
from pathlib import Path

import pytest
from packaging.version import Version

from tests.serving import contract
from tests.serving.source_tree import SourceTree
from vllm_mtp.serving import versions
from vllm_mtp.serving.versions import Release


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return SourceTree(Path(spec.origin).parents[1])


@pytest.fixture(scope="module")
def release() -> Release:
    found = versions.installed()
    assert found is not None
    return found.release or versions.TABLE[-1]


def test_the_sources_are_those_of_the_release(tree: SourceTree) -> None:
    """So that a mistake in the paths does not test one release twice."""
    found = versions.installed()
    assert found is not None
    number = Version(found.version).public
    assert f"__version__ = version = '{number}" in str(tree.text("vllm._version"))


def test_all_that_our_code_needs_is_there(tree: SourceTree, release: Release) -> None:
    assert contract.problems(tree, release) == []


# (module, text, what it becomes, the problem)
CHANGES = {
    "a patched function": (
        "vllm.engine.arg_utils",
        "def create_speculative_config",
        "def speculative_config",
        "create_speculative_config: no such function",
    ),
    "a parameter of a patched function": (
        "vllm.v1.sample.rejection_sampler",
        "cu_num_draft_tokens",
        "old",
        "apply_sampling_constraints: takes no cu_num_draft_tokens",
    ),
    "a constructor of its own": (
        "vllm.v1.spec_decode.draft_model",
        "    def __init__(",
        "    def __new__(cls):\n        pass\n\n    def __init__(",
        "the class is gone, or has a __new__ of its own",
    ),
    "an imported function": (
        "vllm.forward_context",
        "def set_forward_context",
        "def use_forward_context",
        "set_forward_context: not there",
    ),
    "a keyword": (
        "vllm.forward_context",
        "cudagraph_runtime_mode",
        "mode",
        "set_forward_context: takes no cudagraph_runtime_mode",
    ),
    "an inherited attribute": (
        "vllm.v1.spec_decode.llm_base_proposer",
        "kv_cache_gid",
        "group",
        "DraftModelProposer: has no kv_cache_gid",
    ),
    "an inherited method": (
        "vllm.v1.spec_decode.llm_base_proposer",
        "def _sample_from_logits",
        "def _sample",
        "has no _sample_from_logits",
    ),
    "a method that we override": (
        "vllm.v1.spec_decode.llm_base_proposer",
        "def initialize_attn_backend",
        "def initialize_backend",
        "has no initialize_attn_backend to override",
    ),
    "a new parameter": (
        "vllm.v1.spec_decode.llm_base_proposer",
        "num_rejected_tokens_gpu: torch.Tensor | None = None,",
        "num_rejected_tokens_gpu: torch.Tensor | None = None, extra: int = 0,",
        "propose: is called with extra",
    ),
    "a field": (
        "vllm.v1.attention.backend",
        "seq_lens_cpu_upper_bound",
        "upper_bound",
        "CommonAttentionMetadata: has no seq_lens_cpu_upper_bound",
    ),
    "a setting": (
        "vllm.config.parallel",
        "prefill_context_parallel_size",
        "pcp_size",
        "ParallelConfig: has no prefill_context_parallel_size",
    ),
    "a layer that tells a connector something": (
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
        "def wait_for_layer_load(self, layer_name: str) -> None:\n        pass",
        "def wait_for_layer_load(self, layer_name: str) -> None:\n        self.x()",
        "OffloadingConnector: wait_for_layer_load does something",
    ),
    "how a layer finds a connector": (
        "vllm.distributed.kv_transfer.kv_transfer_state",
        "return _KV_CONNECTOR_AGENT is not None",
        "return _AGENT is not None",
        "has_kv_transfer_group: does not say",
    ),
    "who asks first": (
        "vllm.v1.worker.gpu_model_runner",
        "uses_draft_model",
        "has_draft_model",
        "does not call uses_draft_model, then DraftModelProposer",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_named(name: str, tree: SourceTree, release: Release) -> None:
    module, old, new, expected = CHANGES[name]
    text = tree.text(module)
    assert text is not None
    assert old in text, "the change changes nothing"
    changed = tree.with_changed(module, text.replace(old, new))
    found = contract.problems(changed, release)
    assert any(expected in problem for problem in found), found
