# SPDX-License-Identifier: Apache-2.0
"""How fast is it: servers side by side, and what the figures say of other machines."""
