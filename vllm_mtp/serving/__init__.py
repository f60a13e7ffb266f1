# SPDX-License-Identifier: Apache-2.0
"""The drafter inside vLLM's processes: what vLLM loads and calls."""
