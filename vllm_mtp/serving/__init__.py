# SPDX-License-Identifier: Apache-2.0
"""The only position that knows vLLM."""
