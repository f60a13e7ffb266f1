# SPDX-License-Identifier: Apache-2.0
"""The drafter in plain torch. The same modules train and serve; what differs is
the target host that they run on (`hosts.py`)."""
