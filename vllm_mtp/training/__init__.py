# SPDX-License-Identifier: Apache-2.0
"""Training a drafter on its frozen target. Imports no vLLM."""
