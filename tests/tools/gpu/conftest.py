# SPDX-License-Identifier: Apache-2.0
"""The scripts of the GPU run import each other by their bare names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "tools/gpu"))
