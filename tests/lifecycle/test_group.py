"""The engine group as real processes: what it delivers, and what is left of it however it ends."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.engines.parts import (
    MAX_LENGTH,
    Rank,
    alive,
    children,
    group_config,
    of_run,
    random_packs,
    save_tiny,
    spec_of,
    still_running,
    store_files,
    wait_until,
)
from torchspec.engines.client import Endpoint, TrainerClient
from torchspec.engines.group import EngineGroup, GroupConfig
from torchspec.engines.messages import Damaged, Pack, Sample
from torchspec.errors import GroupStopped, UserError
from torchspec.target import TargetConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = 3 * 66_000
"""Bytes of about two packs: work waits for acknowledgements."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target"))


@pytest.fixture
def make(target: Path, tmp_path: Path) -> Iterator[Callable[..., EngineGroup]]:
    """Makes groups, and checks in the end that nothing of them is left."""
    made: list[EngineGroup] = []

    def make(**changes: Any) -> EngineGroup:
        made.append(EngineGroup(group_config(tmp_path, target, **changes)))
        return made[-1]

    yield make
    for group in made:
        group.close()
        wait_until(lambda group=group: not of_run(group.config.token), timeout=10, what="the end of every process")
    assert store_files(tmp_path) == []


def log_of(group: EngineGroup, name: str = "coordinator") -> str:
    return (group.config.log_dir / f"{name}.log").read_text()


def worker_of(group: EngineGroup) -> psutil.Process:
    (worker,) = [p for p in of_run(group.config.token) if "torchspec.engines.worker" in _words(p)]
    return worker


def bytes_of_records(store: Path) -> int:
    """Bytes of the record files below a shared-memory store, without those removed while it was looking."""
    total = 0
    for path in store.glob("*/r*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.alone
@pytest.mark.cold_start
def test_everything_arrives_once_inside_the_budget_and_nothing_stays(make: Callable[..., EngineGroup], tmp_path: Path) -> None:
    group = make(budget=SMALL, engines={"workers": 2})
    endpoint = group.start()
    rank = Rank(endpoint, group.config.spec, random_packs(30))
    wait_until(lambda: sum(w["alive"] for w in rank.client.ask()["workers"].values()) == 2, timeout=120, what="both workers")
    while rank.waiting:
        assert bytes_of_records(tmp_path / "shm") <= SMALL and rank.client.ask()["bytes_alive"] <= SMALL
        rank.take()
    rank.take_all()
    assert rank.taken == sorted(rank.taken) or set(rank.taken) == set(range(30))
    state = rank.settled()
    assert (state["queued"], state["leased"], state["finished"], state["failed"], state["restarts"]) == (0, 0, 0, 0, 0)
    wait_until(lambda: sum(w["samples"] for w in rank.client.ask()["workers"].values()) == 90, timeout=10, what="the counters")
    group.check()
    started = time.monotonic()
    group.close()
    assert time.monotonic() - started < 5.0
    group.close()
    with pytest.raises(GroupStopped):
        rank.client.ask()
    with pytest.raises(GroupStopped):
        group.check()


def test_mooncake_group_starts_delivers_and_leaves_nothing(make: Callable[..., EngineGroup]) -> None:
    pytest.importorskip("mooncake.store")
    before = children(os.getpid())  # of other tests: Python's resource tracker lives as long as this process
    group = make()
    group.config = replace(group.config, store=replace(group.config.store, kind="mooncake"))
    endpoint = group.start()
    rank = Rank(endpoint, group.config.spec, random_packs(6))
    rank.take_all()
    rank.settled()
    rank.close()
    below = [process for process in children(os.getpid()) if process not in before]
    assert any("mooncake" in " ".join(_words(p)) for p in below)
    group.close()
    left = still_running(below, timeout=10)
    assert not left


def test_several_ranks_share_a_pass(make: Callable[..., EngineGroup]) -> None:
    group = make(budget=2 * SMALL)
    endpoint = group.start()
    ranks = [Rank(endpoint, group.config.spec, random_packs(12, world=2, rank=r), rank=r, world=2, num_packs=12) for r in (0, 1)]
    while any(rank.waiting for rank in ranks):
        for rank in ranks:
            if rank.waiting:
                rank.take()
    for rank in ranks:
        rank.take_all()
        rank.close()


def test_a_killed_worker_is_replaced_and_every_sample_arrives_once(make: Callable[..., EngineGroup]) -> None:
    group = make(budget=SMALL)
    rank = Rank(group.start(), group.config.spec, random_packs(20))
    rank.take()
    worker = worker_of(group)
    worker.suspend()
    while rank.client.ask()["leased"] == 0:  # it must die with work in its hands
        rank.take()
    worker.kill()
    rank.take_all()
    state = rank.settled()
    assert state["restarts"] == 1 and state["failed"] == 0
    assert "signal 9" in log_of(group)
    rank.close()


def test_a_silent_worker_is_killed_and_replaced(make: Callable[..., EngineGroup]) -> None:
    """Stopped, so alive but without a heartbeat."""
    group = make(budget=SMALL, engines={"silence_timeout": 2.0})
    rank = Rank(group.start(), group.config.spec, random_packs(12))
    rank.take()
    worker_of(group).suspend()
    rank.take_all()
    assert "silence_timeout" in log_of(group)
    rank.close()


def test_a_worker_that_keeps_a_lease_too_long_is_killed_and_replaced(make: Callable[..., EngineGroup]) -> None:
    group = make(budget=SMALL, engines={"lease_timeout": 2.0})
    rank = Rank(group.start(), group.config.spec, random_packs(12))
    rank.take()
    worker_of(group).suspend()
    rank.take_all()
    assert "lease_timeout" in log_of(group)
    rank.close()


def test_a_worker_that_keeps_dying_stops_the_run_with_its_last_lines(make: Callable[..., EngineGroup]) -> None:
    group = make(engines={"max_restarts": 0})
    rank = Rank(group.start(), group.config.spec, random_packs(2))
    rank.take_all()
    worker_of(group).kill()
    with pytest.raises(GroupStopped, match=r"worker-0 ended with signal 9 after 0 restarts .*max_restarts.*log ends:.*engine up"):
        rank.client.poll(30.0)
    wait_until(lambda: _stopped(group), timeout=10, what="the end of the group")


def _stopped(group: EngineGroup) -> str:
    try:
        group.check()
    except GroupStopped as error:
        return str(error)
    return ""


def test_a_killed_coordinator_takes_everything_along(make: Callable[..., EngineGroup], tmp_path: Path) -> None:
    group = make(budget=SMALL)
    rank = Rank(group.start(), group.config.spec, random_packs(12))
    rank.take()
    assert group._process is not None
    os.kill(group._process.pid, signal.SIGKILL)
    with pytest.raises(GroupStopped):
        while True:
            rank.take(timeout=10)
    wait_until(lambda: not of_run(group.config.token), timeout=5, what="the workers' end")
    message = wait_until(lambda: _stopped(group), timeout=5, what="the news")
    assert "ended with code -9" in message and "coordinator.log" in message
    assert store_files(tmp_path)
    group.close()
    assert store_files(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_coordinator_ends_it_in_order(make: Callable[..., EngineGroup], tmp_path: Path, number: signal.Signals) -> None:
    group = make()
    group.start()
    assert group._process is not None
    wait_until(lambda: of_run(group.config.token), what="a worker")
    os.kill(group._process.pid, number)
    assert group._process.wait(10) == 0
    assert store_files(tmp_path) == [] and not of_run(group.config.token)


OWNER = """
import os, sys, time
from pathlib import Path
from tests.engines.parts import group_config, Rank, random_packs
from torchspec.engines.group import EngineGroup
folder, target = map(Path, sys.argv[1:3])
config = group_config(folder, target, token=sys.argv[3], budget={budget})
endpoint = EngineGroup(config).start()
if sys.argv[4] == "fork" and os.fork() == 0:
    time.sleep(600)   # holds the pipe open, as a data loader's worker would
if sys.argv[4] != "loading":
    rank = Rank(endpoint, config.spec, random_packs(12))
    rank.take()
print("here", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("moment", ["loading", "working", "fork"])
def test_a_killed_owner_leaves_nothing(target: Path, tmp_path: Path, moment: str) -> None:
    token = secrets.token_hex(8)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = OWNER.replace("{budget}", str(SMALL))
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.forks.code", code, str(tmp_path), str(target), token, moment], stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "here\n"
        below = children(owner.pid)
        assert any("torchspec.engines.coordinator" in _words(p) for p in below)
        engines = [p for p in below if _words(p)[2:3] and _words(p)[2].startswith("torchspec.")]
        owner.kill()
        owner.wait()
        left = still_running(engines, timeout=15)
        assert not left and not of_run(token)
        wait_until(lambda: store_files(tmp_path) == [], timeout=5, what="the removal of the store")
    finally:
        owner.kill()
        for process in [p for p in psutil.process_iter() if token in _words(p)]:
            process.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.alone
def test_close_while_the_engines_load_is_quick(make: Callable[..., EngineGroup]) -> None:
    group = make()
    group.start()
    wait_until(lambda: of_run(group.config.token), what="a worker")
    started = time.monotonic()
    group.close()
    assert time.monotonic() - started < 5.0


@pytest.mark.alone
def test_close_is_quick_while_a_child_of_the_owner_holds_the_pipe(make: Callable[..., EngineGroup]) -> None:
    group = make()
    group.start()
    child = os.fork()
    if child == 0:
        signal.pause()
    started = time.monotonic()
    group.close()
    assert time.monotonic() - started < 5.0
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_the_user_can_mend_in_a_worker_reaches_him_as_it_was(make: Callable[..., EngineGroup], target: Path, tmp_path: Path) -> None:
    """Field, value, problem and fix, at the client and at the owner; neither the log nor an earlier run's words."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((target / "config.json").read_text())
    group = make()
    group.config = replace(group.config, target=replace(group.config.target, path=str(broken)))
    group.config.log_dir.mkdir()
    (group.config.log_dir / "worker-0.log").write_text("words of an earlier run\n")
    client = TrainerClient(group.start(), "rank-0")
    with pytest.raises(UserError) as refused:
        client.poll(60.0)
    assert (refused.value.field, repr(refused.value.value)) == ("data.target.path", repr(str(broken))) and "does not load" in refused.value.problem
    with pytest.raises(UserError, match="^" + re.escape(str(refused.value)) + "$"):
        wait_until(lambda: _stopped(group), timeout=10, what="the news")
    assert "does not load" in log_of(group, "worker-0") and "earlier" not in log_of(group, "worker-0")
    assert (group.config.log_dir / "worker-0.log.before").read_text() == "words of an earlier run\n"


def test_a_start_that_takes_too_long_is_ended(make: Callable[..., EngineGroup]) -> None:
    group = make(engines={"start_timeout": 0.05})
    client = TrainerClient(group.start(), "rank-0")
    with pytest.raises(GroupStopped, match=r"not ready after data\.engines\.start_timeout=0\.05 s"):
        client.poll(30.0)


def test_records_of_another_kind_stop_the_run_and_name_the_fields(make: Callable[..., EngineGroup]) -> None:
    group = make()
    spec = replace(group.config.spec, hidden_size=64, target="sha256:other")
    group.config = replace(group.config, spec=spec)
    client = TrainerClient(group.start(), "rank-0")
    with pytest.raises(GroupStopped) as stopped:
        client.poll(60.0)
    assert "hidden_size is 32, the trainer expects 64" in str(stopped.value) and "target is" in str(stopped.value)
    assert "dtype" not in str(stopped.value)


def test_an_engine_that_takes_too_little_is_refused(make: Callable[..., EngineGroup]) -> None:
    group = make(max_length=4096)
    client = TrainerClient(group.start(), "rank-0")
    with pytest.raises(GroupStopped, match=r"takes at most 512 tokens, data\.max_length is 4096"):
        client.poll(60.0)


def test_a_poison_sample_is_named_and_its_neighbours_arrive(make: Callable[..., EngineGroup]) -> None:
    group = make()
    group.config = replace(group.config, engines=replace(group.config.engines, max_failed_fraction=0.5))
    too_long = Sample(100, torch.zeros(600, dtype=torch.int32).numpy().tobytes())
    bad_ids = Sample(101, torch.tensor([5, 96], dtype=torch.int32).numpy().tobytes())
    packs = random_packs(3)
    packs[1] = Pack(1, [too_long, *packs[1].samples, bad_ids])
    rank = Rank(group.start(), group.config.spec, packs)
    rank.take_all()
    assert rank.failed.keys() == {100, 101} and len(rank.records) == 9
    assert "600 tokens" in rank.failed[100] and "vocabulary" in rank.failed[101]
    rank.settled()
    rank.close()


def test_too_many_failures_stop_the_run(make: Callable[..., EngineGroup]) -> None:
    group = make()
    bad = Pack(0, [Sample(i, torch.tensor([96], dtype=torch.int32).numpy().tobytes()) for i in range(3)])
    rank = Rank(group.start(), group.config.spec, [bad])
    with pytest.raises(GroupStopped, match="max_failed_fraction"):
        rank.take()


def test_a_damaged_record_is_produced_again(make: Callable[..., EngineGroup]) -> None:
    group = make()
    rank = Rank(group.start(), group.config.spec, random_packs(1))
    ready = rank.client.poll(60.0)
    assert ready is not None
    first = ready.records[0]
    rank.store.delete([first.key])
    rank.client.reissue("train", 0, 0, [Damaged(first.index, first.key, "gone")])
    again = rank.take()
    assert {r.index for r in again.records} == {r.index for r in ready.records} and first.key not in {r.key for r in again.records}
    rank.settled()
    rank.close()


def test_a_rank_that_vanishes_gives_its_bytes_back(make: Callable[..., EngineGroup]) -> None:
    group = make()
    endpoint = group.start()
    rank = Rank(endpoint, group.config.spec, random_packs(4))
    wait_until(lambda: rank.client.ask()["finished"] == 12, what="the records")
    rank.close()
    observer = TrainerClient(endpoint, "observer", role="observer")
    wait_until(lambda: observer.ask()["bytes_alive"] == 0, timeout=10, what="the credit to return")
    observer.close()


@pytest.mark.alone
def test_a_lost_store_stops_the_run_within_seconds(make: Callable[..., EngineGroup], tmp_path: Path) -> None:
    group = make(budget=SMALL)
    rank = Rank(group.start(), group.config.spec, random_packs(4))
    rank.take()
    (folder,) = (tmp_path / "shm").iterdir()
    wait_until(lambda: (shutil.rmtree(folder, ignore_errors=True), not folder.exists())[1], timeout=10, what="the removal")  # writers add files meanwhile
    started = time.monotonic()
    with pytest.raises(GroupStopped, match="store"):
        while True:
            rank.client.poll(10.0)
    assert time.monotonic() - started < 10.0


@pytest.mark.alone
def test_a_killed_mooncake_stops_the_run_within_seconds(make: Callable[..., EngineGroup]) -> None:
    pytest.importorskip("mooncake.store")
    group = make()
    group.config = replace(group.config, store=replace(group.config.store, kind="mooncake"))
    rank = Rank(group.start(), group.config.spec, random_packs(2))
    rank.take_all()
    rank.settled()  # the coordinator has deleted records: it is connected itself
    masters = [p for p in children(os.getpid()) if "mooncake_master" in " ".join(_words(p))]
    assert masters
    started = time.monotonic()
    masters[0].kill()
    with pytest.raises(GroupStopped, match="mooncake store died"):
        rank.client.poll(20.0)
    assert time.monotonic() - started < 10.0


def test_a_run_that_nobody_joins_ends_where_that_is_bounded(make: Callable[..., EngineGroup]) -> None:
    group = make(engines={"workers": 0, "no_worker_timeout": 1.0})
    client = TrainerClient(group.start(), "rank-0")
    with pytest.raises(GroupStopped, match=r"no worker alive for 1 s, which is data\.engines\.no_worker_timeout"):
        client.poll(10.0)


def test_a_port_that_is_taken_is_said(make: Callable[..., EngineGroup]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        group = make(listen_port=port)
        with pytest.raises(GroupStopped, match=f"cannot listen on 127.0.0.1:{port}"):
            group.start()


def hand_started(endpoint: Endpoint, *, token: str, name: str = "by-hand") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torchspec.engines.worker", "--coordinator", f"{endpoint.host}:{endpoint.port}", "--name", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHSPEC_TOKEN": token}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_worker_started_by_hand_works_and_ends_with_the_run(make: Callable[..., EngineGroup]) -> None:
    group = make(engines={"workers": 0}, budget=SMALL)
    endpoint = group.start()
    worker = hand_started(endpoint, token=endpoint.token)
    rank = Rank(endpoint, group.config.spec, random_packs(6))
    rank.take_all()
    rank.close()
    group.close()
    output, _ = worker.communicate(timeout=15)
    assert worker.returncode == 0 and b"ended the run" in output


def test_a_worker_that_is_told_to_end_gives_back_what_it_holds(make: Callable[..., EngineGroup]) -> None:
    """SIGTERM, with no attempt left: its samples are not given up."""
    group = make(engines={"workers": 0, "max_attempts": 1}, budget=SMALL)
    said: list[str] = []
    group._say = said.append
    endpoint = group.start()
    first = hand_started(endpoint, token=endpoint.token, name="first")
    rank = Rank(endpoint, group.config.spec, random_packs(6))
    rank.take()
    first.send_signal(signal.SIGTERM)
    words, _ = first.communicate(timeout=15)
    assert first.returncode == 0 and b"goes to others" in words, words
    wait_until(lambda: len(said) > 1, timeout=10, what="the line")
    assert said[1].startswith("worker first left (host ") and said[1].endswith(", it was told to end): 0 alive")
    second = hand_started(endpoint, token=endpoint.token, name="second")
    rank.take_all()
    assert not rank.failed
    rank.close()
    group.close()
    assert second.wait(15) == 0


def test_a_worker_by_hand_does_not_take_the_name_of_one_that_is_loading(make: Callable[..., EngineGroup]) -> None:
    group = make(budget=SMALL)
    endpoint = group.start()
    worker = hand_started(endpoint, token=endpoint.token, name="worker-0")
    said, _ = worker.communicate(timeout=60)
    assert worker.returncode == 2 and b"take another --name" in said, said
    rank = Rank(endpoint, group.config.spec, random_packs(3))
    rank.take_all()
    assert rank.client.ask()["restarts"] == 0
    rank.close()


def test_a_late_worker_of_another_target_is_refused_and_the_run_goes_on(make: Callable[..., EngineGroup], target: Path, tmp_path: Path) -> None:
    """The target's configuration is changed on the disk while the run is on; the user of either side reads one line."""
    own = shutil.copytree(target, tmp_path / "copy")
    group = make(budget=SMALL)
    group.config = replace(group.config, target=TargetConfig(str(own)), spec=spec_of(own))
    said: list[str] = []
    group._say = said.append
    endpoint = group.start()
    rank = Rank(endpoint, group.config.spec, random_packs(6))
    rank.take()
    assert said == [f"worker worker-0 joined (host {socket.gethostname()}): 1 alive"]
    config = (own / "config.json").read_text()
    (own / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert (own / "config.json").read_text() != config
    worker = hand_started(endpoint, token=endpoint.token)
    words, _ = worker.communicate(timeout=60)
    assert worker.returncode == 2 and b"refused this worker: it would write other records than this run needs: target is" in words.splitlines()[-1], words
    wait_until(lambda: len(said) > 1, timeout=10, what="the line")
    assert "worker by-hand (127.0.0.1) is refused, the run goes on without it: it would write other records" in said[1] and len(said) == 2
    rank.take_all()
    group.check()
    rank.close()


def test_a_silent_worker_of_another_host_loses_its_leases(make: Callable[..., EngineGroup]) -> None:
    """The coordinator cannot kill it: it drops the connection, and gives the work to another."""
    group = make(engines={"workers": 0, "silence_timeout": 2.0, "lease_timeout": 4.0}, budget=SMALL)
    endpoint = group.start()
    first = hand_started(endpoint, token=endpoint.token, name="first")
    rank = Rank(endpoint, group.config.spec, random_packs(12))
    rank.take()
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = hand_started(endpoint, token=endpoint.token, name="second")
        rank.take_all()
    finally:
        os.kill(first.pid, signal.SIGCONT)
    said, _ = first.communicate(timeout=15)  # awake again, it finds its connection gone
    assert first.returncode == 2 and b"is gone (" in said, said
    rank.settled()
    assert "silence_timeout" in log_of(group)
    rank.close()
    group.close()
    assert second.wait(15) == 0


def test_a_wrong_token_is_refused_and_logged(make: Callable[..., EngineGroup]) -> None:
    group = make(engines={"workers": 0})
    endpoint = group.start()
    with pytest.raises(GroupStopped, match="wrong run token"):
        TrainerClient(replace(endpoint, token="guess"), "rank-0")
    worker = hand_started(endpoint, token="guess")
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 2 and b"wrong run token" in output
    assert log_of(group).count("wrong run token") == 2 and endpoint.token not in log_of(group)
    group.check()


def test_the_token_is_on_no_command_line(make: Callable[..., EngineGroup]) -> None:
    group = make()
    group.start()
    wait_until(lambda: of_run(group.config.token), what="a worker")
    assert not [p for p in psutil.process_iter() if group.config.token in " ".join(_words(p))]


def test_devices_must_fit_the_workers(target: Path, tmp_path: Path) -> None:
    config: GroupConfig = group_config(tmp_path, target, engines={"workers": 2, "devices": ["cpu"]})
    with pytest.raises(UserError, match=r"data\.engines\.devices"):
        EngineGroup(config).start()
    assert alive(os.getpid()) and config.max_length == MAX_LENGTH
