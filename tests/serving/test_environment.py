# SPDX-License-Identifier: Apache-2.0
"""The environment of a benchmark's servers."""

import os
import subprocess
import sys

import pytest
import torch

from vllm_mtp.bench.cpu_settings import (
    added,
    fastest_environment,
    intel_openmp,
    shown,
)

BIND = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
needs_openmp = pytest.mark.skipif(
    intel_openmp() is None, reason="intel-openmp is not installed"
)


@needs_openmp
def test_the_library_is_loaded_in_a_process_with_it() -> None:
    before = dict(os.environ)
    code = "print(open('/proc/self/maps').read())"
    with added(fastest_environment({})):
        maps = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "libiomp5" in maps
    assert dict(os.environ) == before, "only while it was wanted"


def test_every_core_computes() -> None:
    assert fastest_environment({})[RESERVED] == "0"


@pytest.mark.parametrize("name", [BIND, RESERVED])
def test_cores_that_the_user_chose_are_kept(name: str) -> None:
    assert not {BIND, RESERVED} & set(fastest_environment({name: "1"}))


@needs_openmp
def test_other_libraries_stay_preloaded() -> None:
    assert fastest_environment({"LD_PRELOAD": "/lib/libtcmalloc.so"})[
        "LD_PRELOAD"
    ].startswith("/lib/libtcmalloc.so:/")
    for openmp in ("/lib/libgomp.so.1", "/lib/libomp.so", "/lib/libiomp5.so"):
        assert "LD_PRELOAD" not in fastest_environment({"LD_PRELOAD": openmp})


def test_nothing_is_added_where_a_gpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fastest_environment({}) == {}


def test_what_was_set_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MTP_SOME", "before")
    with added({"VLLM_MTP_SOME": "in", "VLLM_MTP_OTHER": "in"}):
        assert os.environ["VLLM_MTP_SOME"] == os.environ["VLLM_MTP_OTHER"] == "in"
    assert os.environ["VLLM_MTP_SOME"] == "before"
    assert "VLLM_MTP_OTHER" not in os.environ


def test_a_report_shows_no_folders() -> None:
    environment = {"LD_PRELOAD": "/a/b/libc.so:/d/libiomp5.so", RESERVED: "0"}
    assert shown(environment) == f"LD_PRELOAD=libc.so:libiomp5.so {RESERVED}=0"
