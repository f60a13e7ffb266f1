# SPDX-License-Identifier: Apache-2.0
"""Names for the stages of a draft, as a profiler shows them (`bound.scope`)."""

DRAFT = "mtp_placeholder: draft"  # the stages below, and what lies between them
LAYERS = "mtp_placeholder: layers"
HEAD = "mtp_placeholder: LM head"
CHOICE = "mtp_placeholder: choice"
