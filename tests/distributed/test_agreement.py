"""Ranks agree on every batch, and find out together whether all of them leave. (Lightning is imported where it is asked for: every rank imports this file.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tests.distributed.ranks import on_ranks
from torchspec import agreement
from torchspec.agreement import Agreement, Vote
from torchspec.errors import GroupStopped


def test_alone_a_rank_agrees_with_itself() -> None:
    for vote in Vote:
        assert Agreement()(vote) is vote
    assert Agreement().all_leave() and Agreement().alike(3)


def _votes(rank: int) -> None:
    agree = Agreement(2)
    assert not agree.all_leave()  # before the first batch there is nothing to save
    for mine in ([Vote.GO, Vote.GO], [Vote.GO, Vote.STOP], [Vote.FAILED, Vote.STOP], [Vote.GO, Vote.GO]):
        assert agree(mine[rank]) is max(mine) and agree.reached is max(mine)
    assert agree.all_leave() and agree.alike(7) and agree.alike(-1)
    assert not agree.alike([7, -1][rank]) and not agree.alike([6, 7][rank])


@pytest.mark.slow
def test_the_highest_vote_counts_and_all_leave_together(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _votes)


def _one_leaves(rank: int) -> None:
    agreement._GATHERING = timedelta(seconds=1)
    agree = Agreement(2)
    agree(Vote.GO)
    if rank == 0:
        began = time.monotonic()
        assert not agree.all_leave()
        assert time.monotonic() - began < 10
    else:
        with pytest.raises(GroupStopped, match="rank-N.log"):
            agree(Vote.GO)  # rank 0 never votes again


@pytest.mark.slow
def test_a_rank_that_leaves_alone_knows_it_and_the_other_hears_of_its_end(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _one_leaves)


def _told_while_waiting(rank: int) -> None:
    agree = Agreement(2)
    agree(Vote.GO)
    if rank == 1:
        time.sleep(3)  # no batch
    began, heard = time.monotonic(), []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(time.monotonic() - began))
    if rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert agree(Vote.GO) is Vote.GO
    if rank == 0:
        assert len(heard) == 1 and heard[0] < 1.5, heard  # not when the other one voted


@pytest.mark.slow
def test_a_rank_hears_signals_while_another_has_no_batch(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _told_while_waiting)


def test_what_we_take_over_from_lightning_is_still_there() -> None:
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor) and callable(_SignalConnector._sigterm_notifier_fn)
    assert "procs" in _SubprocessScriptLauncher(cluster_environment=None, num_processes=1, num_nodes=1).__dict__  # type: ignore[arg-type]


def test_ddp_does_not_send_the_frozen_tables() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    from torchspec.models.training.parallelize import ddp_options, register_strategies

    register_strategies()
    strategy = StrategyRegistry.get("ddp")
    assert strategy._ddp_kwargs == ddp_options() and ddp_options()["gradient_as_bucket_view"]
    assert [value for name, value in ddp_options().items() if name.endswith("_buffers")] == [False]


def test_a_run_that_a_script_starts_after_a_fit_of_its_own_is_no_rank_of_it() -> None:
    ask = (
        "import os; from torchspec import ranks\n"
        "for local in (None, '0', '1'):\n"
        "    if local is not None: os.environ['LOCAL_RANK'] = local\n"
        "    print(ranks._launched())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | {"TORCHSPEC_LAUNCHER": str(os.getpid())}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]
