"""Decoding processes that may die: a crash, a hang or too much memory costs one file, not the packing.

Processes stay for many files, so that isolation costs a message per file and not a process. Each has its own queue of a
few jobs. One that dies or stops answering is started again once with the same file; if that happens again the file is
refused. Answers come back in the order of the jobs, whatever the number of processes. What a process may do is in
`decode_worker`.

Decodes PNGs and JPEGs out of shards in processes of their own, so that none can stop or end a training (B27).

Their bytes are those that were packed, but who packed them may have been anybody, and a decoder that hangs holds a
thread for ever: no thread can be ended from outside. So they go where the files of packing go (`isolation`), with a
shorter deadline: two tries are over before a launcher would take the rank for dead. That costs 0.2 ms for a picture of
256 pixels, beside 0.55 ms of decoding for a PNG and 0.2 for a JPEG. Raw shards, the default, have no decoder and do not
come here. Nor does DALI: a decoder that hangs there is a rank that hangs (C6).

Processes belong to this process, not to a loader: as many as its threads decode at a time, kept for the next. So is
what came of bytes that no decoder got through: a sample that hangs is met again every epoch.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from ddpm_lmk.data.images.decode import RefusedImageError
from ddpm_lmk.data.images.sandbox_worker import HEADER, Answer
from ddpm_lmk.errors import LaunchError
from ddpm_lmk.system import limits

MEMORY_BYTES = 2 << 30
DEADLINE_S = 30.0
_QUEUE = 4  # jobs a process has beforehand; their messages fit a pipe, so that writing them never blocks
_PIPE_BYTES = 1 << 18  # a picture of 256 pixels goes through at once, in both directions
_WINDOW = 24  # answers per process that may wait for an earlier one
_START_S = 120.0  # a busy file system may take long to import from
_TICK_S = 1.0


@dataclass(eq=False)
class _Job:
    number: int
    message: dict[str, Any]
    failures: int = 0


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    complaints: Any  # its standard error until it is ready
    is_ready: bool = False
    has_ended: bool = False
    queue: deque[_Job] = field(default_factory=deque)
    received: bytearray = field(default_factory=bytearray)
    waited_s: float = 0.0  # for the first of the queue


class Isolation:
    """Context manager: `count` decoding processes, started when they are first needed.

    Raises:
        LaunchError: a process cannot be started at all.
    """

    def __init__(self, count: int, *, memory_bytes: int = MEMORY_BYTES, deadline_s: float = DEADLINE_S) -> None:
        self._count, self._memory_bytes, self._deadline_s = max(1, count), memory_bytes, deadline_s
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._again: deque[_Job] = deque()  # taken back from a process that died
        self._done: dict[int, Answer] = {}

    def __enter__(self) -> Isolation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()

    def answers(self, messages: Iterable[dict[str, Any]]) -> Iterator[Answer]:
        """The answer to every message, in their order; call it to its end before calling it again.

        A message with `content` (bytes that the process is to decode) comes alone: it may not fit a pipe, and a process
        that is answering does not read.
        """
        jobs = (_Job(number, message) for number, message in enumerate(messages))
        given = taken = 0
        while True:
            while (job := self._next(jobs, may_take=taken - given < _WINDOW * self._count)) is not None:
                taken = max(taken, job.number + 1)
                self._send(job)
            if given in self._done:
                yield self._done.pop(given)
                given += 1
            elif given == taken:
                return
            else:
                self._listen()

    def _next(self, jobs: Iterator[_Job], *, may_take: bool) -> _Job | None:
        """The next job, where there is one and a process has room for it; without `may_take` only one given back."""
        has_room = len(self._workers) < self._count or any(len(worker.queue) < _QUEUE for worker in self._workers)
        if not has_room:
            return None
        if self._again:
            return self._again.popleft()
        return next(jobs, None) if may_take else None

    def _send(self, job: _Job) -> None:
        for idle in [worker for worker in self._workers if not worker.queue and worker.process.poll() is not None]:
            self._end(idle)  # it died of something else, which is not to be blamed on this job
        worker = min(self._workers, key=lambda worker: len(worker.queue), default=None)
        if worker is None or (worker.queue and len(self._workers) < self._count):
            worker = self._start()
        assert worker.process.stdin is not None
        if not worker.queue:
            worker.waited_s = 0.0
        worker.queue.append(job)
        with contextlib.suppress(BrokenPipeError):  # it died: its answers end, which is noticed when listening
            worker.process.stdin.write(_framed(job.message))
            worker.process.stdin.flush()

    def _listen(self) -> None:
        """Wait for answers; end processes that have been silent for too long.

        Only time spent waiting here counts: a parent that was busy or stopped does not make its children late.
        """
        began = time.monotonic()
        heard = {key.data for key, _ in self._selector.select(_TICK_S)}
        waited = min(time.monotonic() - began, _TICK_S)
        for worker in heard:
            self._receive(worker)
        for worker in [worker for worker in self._workers if worker.queue and worker not in heard]:
            worker.waited_s += waited
            if worker.waited_s > (self._deadline_s if worker.is_ready else _START_S):
                self._lose(worker, ("TIMEOUT", f"decoding takes more than {self._deadline_s:g} s"))

    def _receive(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        chunk = os.read(worker.process.stdout.fileno(), _PIPE_BYTES)
        if not chunk:
            worker.has_ended = True
            return self._lose(worker, None)
        worker.received += chunk
        while (answer := _taken(worker.received)) is not None:
            worker.waited_s = 0.0
            if worker.is_ready:
                self._done[worker.queue.popleft().number] = answer
            worker.is_ready = True
        return None

    def _lose(self, worker: _Worker, reason: tuple[str, str] | None) -> None:
        """A process died (no reason) or is late: its first job is to blame, the others go to another."""
        if not worker.is_ready:
            worker.complaints.seek(0)
            said = worker.complaints.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise LaunchError(f"a decoding process does not start: {said[-1]}; check the installation with `doctor`")
        self._end(worker)
        code, text = reason or ("CRASH", f"the decoder crashed ({_manner(worker.process.returncode)})")
        jobs = list(worker.queue)
        if jobs:
            jobs[0].failures += 1
            if jobs[0].failures > 1:
                self._done[jobs.pop(0).number] = {"code": code, "refused": text}, b""
        self._again.extendleft(reversed(jobs))

    def _start(self) -> _Worker:
        command = [sys.executable, "-c", _ENTRY, str(self._memory_bytes)]
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=environment
        )
        worker = _Worker(process, complaints)
        self._workers.append(worker)
        assert process.stdin is not None
        assert process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            limits.widen_pipe(pipe.fileno(), _PIPE_BYTES)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        assert worker.process.stdin is not None
        assert worker.process.stdout is not None
        self._workers.remove(worker)
        self._selector.unregister(worker.process.stdout)
        with contextlib.suppress(BrokenPipeError):  # it died with a job unread
            worker.process.stdin.close()
        if not worker.has_ended:
            worker.process.kill()
        worker.process.wait()
        worker.process.stdout.close()
        worker.complaints.close()


_ENTRY = "from ddpm_lmk.data.images.sandbox_worker import main; main()"


def _framed(message: dict[str, Any]) -> bytes:
    """A message as the process reads it: the size of the JSON, the JSON, and the content whose size it tells."""
    content = message.get("content", b"")
    text = json.dumps({**message, "content": len(content)} if content else message).encode("ascii")
    return len(text).to_bytes(4, "little") + text + content


def _taken(received: bytearray) -> Answer | None:
    """Take one whole answer from the front, where there is one."""
    if len(received) < HEADER.size:
        return None
    text_size, content_size = HEADER.unpack_from(received)
    end = HEADER.size + text_size + content_size
    if len(received) < end:
        return None
    with memoryview(received) as view:
        said = json.loads(bytes(view[HEADER.size : HEADER.size + text_size]))
        content = bytes(view[HEADER.size + text_size : end])
    del received[:end]
    return said, content


def _manner(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


FILE_DEADLINE_S = 10.0  # 20,000 times as long as a PNG of 256 pixels takes

_KEPT = {"TIMEOUT", "CRASH", "MEMORY"}  # what is costly to find out again

_lock = threading.Lock()
_idle: list[Isolation] = []
_refused: dict[bytes, tuple[str, str]] = {}  # by digest of the bytes
_ending = ExitStack()
atexit.register(_ending.close)


def decode_guarded(data: bytes, *, size: int, bits: int) -> np.ndarray:
    """As `stored.decode_square`, and read-only.

    Raises:
        RefusedImageError: also for bytes whose decoder twice crashed, hung, or wanted too much memory.
        LaunchError: no process can be started.
    """
    if _refused and (known := _refused.get(hashlib.sha256(data).digest())) is not None:
        raise RefusedImageError(*known)
    with _lock:
        isolation = _idle.pop() if _idle else _ending.enter_context(Isolation(1, deadline_s=FILE_DEADLINE_S))
    ((said, content),) = isolation.answers([{"content": data, "size": size, "bits": bits}])
    with _lock:  # not reached after an error: what state it is in is not known
        _idle.append(isolation)
    if "refused" in said:
        refusal = said["code"], said["refused"]
        if said["code"] in _KEPT:
            _refused[hashlib.sha256(data).digest()] = refusal
        raise RefusedImageError(*refusal)
    return np.frombuffer(content, np.uint8 if bits == 8 else np.uint16).reshape(size, size)
