# SPDX-License-Identifier: Apache-2.0
"""The commands of ``vllm-mtp``, one module each."""
