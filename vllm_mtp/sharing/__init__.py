# SPDX-License-Identifier: Apache-2.0
"""What a drafter's folder says about itself, and how it is shared."""
