# SPDX-License-Identifier: Apache-2.0
"""Is the output the target's, and how long are the accepted runs?"""
