# SPDX-License-Identifier: Apache-2.0
"""Prompts, and the target's own answers to them as a dataset."""
