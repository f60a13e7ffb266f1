# SPDX-License-Identifier: Apache-2.0
"""docs/patches.md is what the ledger says."""

from tools import ledger_table
from vllm_mtp.serving.ledger import PATCHES


def test_the_page_is_up_to_date() -> None:
    page = ledger_table.PAGE.read_text("utf-8")
    assert ledger_table.with_table(page) == page, "run python tools/ledger_table.py"
    assert all(f"`{patch.symbol}`" in page for patch in PATCHES)
