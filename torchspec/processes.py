"""Ending a process group without leaving its shared memory behind.

A Python process whose children share memory or semaphores (vLLM's queues) has a resource tracker beside it, which unlinks them when all of them are gone.
Killed with the rest of the group, it would leave them in /dev/shm for good: so trackers are let go by themselves.
"""

from __future__ import annotations

import logging
import os
import signal
import time

import psutil

log = logging.getLogger(__name__)
_TRACKERS = 3.0
"""Seconds for resource trackers to clean up after their processes."""


def kill_group(group: int) -> None:
    """End all processes of a group (not our own) now, and return when its resource trackers have cleaned up."""
    deadline = time.monotonic() + _TRACKERS
    while (trackers := kill_but_trackers(group)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if trackers:
        log.warning("resource trackers %s do not end: killed", trackers)
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def kill_but_trackers(group: int) -> list[int]:
    """Kill the members of a group, but for this process and the resource trackers, whose ids are returned."""
    trackers = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or os.getpgid(process.pid) != group or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if any("multiprocessing.resource_tracker" in word for word in process.cmdline()):
                trackers.append(process.pid)
            else:
                process.kill()
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return trackers
