# SPDX-License-Identifier: Apache-2.0
"""The drafter on transformers: training and offline evaluation run here.

Its twin is `vllm_mtp.serving`, which runs the same drafter on vLLM. Imports no vLLM."""
