# SPDX-License-Identifier: Apache-2.0
"""Drafters for SmolLM2-135M-Instruct. Only data: vllm-mtp finds the folders by this
distribution's entry points, and never imports this package."""
