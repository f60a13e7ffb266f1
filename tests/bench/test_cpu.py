# SPDX-License-Identifier: Apache-2.0
"""Which CPU this is, by made-up machines."""

import platform
from pathlib import Path

import pytest
import torch

from vllm_mtp.bench import cpu
from vllm_mtp.bench.cpu_settings import fastest_dtype

# name: (platform.machine(), /proc/cpuinfo, name in a report, fastest type where oneDNN
# says that it can compute in bfloat16)
MACHINES = {
    "Intel with AMX": (
        "x86_64",
        (
            "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Processor\n"
            "flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n\n"
            "processor\t: 1\nmodel name\t: Intel(R) Xeon(R) Processor\n"
        ),
        "Intel Xeon Processor (avx2, avx512f, avx512_bf16, amx_bf16)",
        "bfloat16",
    ),
    "Intel with AVX-512 alone": (
        "x86_64",
        (
            "model name : Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz\n"
            "flags : avx2 avx512f avx512_vnni\n"
        ),
        "Intel Xeon Platinum 8275CL (avx2, avx512f)",
        "float32",
    ),
    "AMD with AVX2": (
        "x86_64",
        "model name : AMD EPYC 7B13 64-Core Processor\nflags : avx2 sse4a\n",
        "AMD EPYC 7B13 (avx2)",
        "float32",
    ),
    "AMD with bfloat16": (
        "AMD64",
        (
            "model name : AMD EPYC 9R14 96-Core Processor\n"
            "flags : avx2 avx512f avx512_bf16\n"
        ),
        "AMD EPYC 9R14 (avx2, avx512f, avx512_bf16)",
        "bfloat16",
    ),
    "Arm": (
        "aarch64",
        "processor : 0\nFeatures : fp asimd sve bf16\nCPU part : 0xd40\n",
        "aarch64 (asimd, sve, bf16)",
        "bfloat16",
    ),
    "x86 without the file": ("x86_64", None, "x86_64", "float32"),
    "Arm without the file": ("arm64", None, "arm64", "bfloat16"),
}


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without a GPU, and with a oneDNN that says it can compute in bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    return monkeypatch


@pytest.mark.parametrize("name", MACHINES)
def test_the_name_and_the_type_of_a_machine(
    name: str, tmp_path: Path, bfloat16: pytest.MonkeyPatch
) -> None:
    machine, cpuinfo, shown, dtype = MACHINES[name]
    bfloat16.setattr(platform, "machine", lambda: machine)
    bfloat16.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert str(cpu.this_cpu()) == shown
    assert fastest_dtype() == dtype


def test_a_onednn_without_bfloat16_computes_in_float32(
    tmp_path: Path, bfloat16: pytest.MonkeyPatch
) -> None:
    machine, cpuinfo, _, _ = MACHINES["Intel with AMX"]
    bfloat16.setattr(platform, "machine", lambda: machine)
    bfloat16.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(str(cpuinfo))
    bfloat16.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert fastest_dtype() == "float32"
    bfloat16.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    bfloat16.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fastest_dtype() == "float32"


def test_a_gpu_leaves_the_type_to_vllm(bfloat16: pytest.MonkeyPatch) -> None:
    bfloat16.setattr(torch.cuda, "is_available", lambda: True)
    assert fastest_dtype() == "auto"
