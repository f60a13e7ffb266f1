# SPDX-License-Identifier: Apache-2.0
"""The drafter in plain torch. The same modules train and serve.

What differs is the target host that they run on (`host.py`): `vllm_mtp.torch_host` or
`vllm_mtp.serving`."""
