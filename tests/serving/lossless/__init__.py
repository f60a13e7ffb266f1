# SPDX-License-Identifier: Apache-2.0
"""The matrix: everything that vLLM can do to a request, with and without a drafter.

`rows.py` is the table, `plays.py` what its rows let an engine do, `subjects.py` the
targets, and `matrix.py` runs rows and compares the two sides. The tests and
`tools/lossless.py`, which writes docs/lossless.md, run the same rows.
"""
