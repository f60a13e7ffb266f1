# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process (`vllm.general_plugins`)."""

import logging

METHOD = "mtp_placeholder"
_CONFIG_CLASS = "vllm_mtp.serving.registered.RegisteredSpecConfig"


def register() -> None:
    """Make vLLM know the method ``mtp_placeholder``.

    Never raises: an exception here would end every vLLM on the machine, also
    those that never asked for our method. Idempotent and cheap: it registers a name, or
    wraps one function where vLLM has no registry; everything else happens when the
    method is used.
    """
    try:
        from vllm_mtp.serving.ledger import install_at_start, vllm_registry

        add_method = vllm_registry()
        if add_method is None:
            install_at_start()
        else:
            add_method(METHOD, _CONFIG_CLASS)
    except Exception:
        # vLLM configures only its own loggers, so ours must be a child of it.
        logging.getLogger("vllm.mtp_placeholder").exception(
            "vllm-mtp could not register; the method %r is not available, "
            "everything else works. Run `vllm-mtp doctor`.",
            METHOD,
        )
