# SPDX-License-Identifier: Apache-2.0
"""Which of several processes of a command speaks."""

import contextlib
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from vllm_mtp import processes
from vllm_mtp.cli.main import main


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """This process is the second; the store is the launcher's."""
    store = TCPStore(
        "127.0.0.1",
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=5),
    )
    environment = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return store


WRONG_FLAG = ["inspect", "--no-such-flag"]
WRONG_FOLDER = ["inspect", "/nonexistent"]


def test_one_process_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slurm and others set the one or the other.
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
        assert processes.is_first()
        assert processes.is_first_to_fail()
        monkeypatch.delenv(name)


@pytest.mark.parametrize("command", [WRONG_FLAG, WRONG_FOLDER])
def test_the_first_to_fail_says_it_and_no_other(
    command: list[str],
    second_of_two: TCPStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said() -> str:
        with contextlib.suppress(SystemExit):
            assert main(command) == 1
        return capsys.readouterr().err

    assert "vllm-mtp inspect:" in said()
    monkeypatch.setenv("RANK", "0")
    assert said() == ""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # a new attempt
    assert "vllm-mtp inspect:" in said()


def test_where_nobody_can_be_asked_all_say_it(
    second_of_two: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not processes.is_first()
    monkeypatch.delenv("MASTER_PORT")
    assert processes.is_first_to_fail()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[..gloo/transport/tcp/pair.cc:553] Connection closed"), True),
        (RuntimeError("NCCL communicator was aborted on rank 0"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_an_exchange_that_fails_is_known(
    error: Exception, lost: bool, second_of_two: TCPStore
) -> None:
    assert processes.lost_another(error) == lost
