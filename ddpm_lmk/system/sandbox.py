"""Confined processes for code that reads foreign files: a crash, a hang or too much memory costs one answer.

A crafted or broken file can make a decoder run code, crash, hang or take all memory, and a thread that hangs cannot be
ended from outside. So such code runs in processes of its own, under limits that the kernel enforces. A process stays
for many messages, because starting one costs more than most answers. Messages are JSON and bytes: the parent never
interprets what came out of a decoder. Two users: `data.images.sandbox` and `models.import_torch`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Any

from ddpm_lmk.errors import LaunchError
from ddpm_lmk.system.limits import confine, widen_pipe

Answer = tuple[dict[str, Any], bytes]

_HEADER = struct.Struct("<II")  # sizes of the JSON and of the bytes that follow it
_PIPE_BYTES = 1 << 18  # an image of 256 pixels goes through at once, in both directions
_AHEAD = 24  # answers per process that may wait for an earlier one: bounds the memory of the parent
_START_S = 120.0  # a busy file system may take long to import from
_TICK_S = 1.0
# Secrets that stand in the environment are not for a process that reads foreign files. How Python finds its modules and
# spells names of files is: without the locale a name that is not ASCII could not be opened.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_", "PYTHON", "LD_", "DYLD_")
_FORBIDDEN = (
    *("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.", "pickle.", "shutil."),
    *("os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.mkdir", "os.chmod", "os.chown"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Limits:
    """What a process may use."""

    memory_bytes: int  # addresses, on top of those it has at its start
    deadline_s: float  # for one answer
    file_bytes: int = 0  # size of a file it writes; 0: it writes, starts and unpickles nothing
    cpu_s: int | None = None
    has_network: bool = True  # False: it has none where the kernel allows that
    tries: int = 2  # a process may have been killed from outside, which is not to be blamed on a file


class Sandbox:
    """Context manager: up to `count` processes that run `module`, whose main calls `serve`; started when needed.

    An answer with `refused` and `code` says why there is none: CRASH, TIMEOUT or MEMORY, or what the function says.
    """

    def __init__(self, module: str, limits: Limits, *, count: int = 1) -> None:
        self._module, self._limits, self._count = module, limits, max(1, count)
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="sandbox")
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._processes: set[_Process] = set()
        self._is_closed = False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_closed = True
            for process in self._processes:
                process.child.kill()  # threads that wait for an answer see its end
        self._threads.shutdown(cancel_futures=True)
        for process in list(self._processes):  # also one that was just being started
            self._drop(process)

    def answers(self, messages: Iterable[dict[str, Any]]) -> Iterator[Answer]:
        """The answer to every message, in their order, whatever the number of processes."""
        pending: deque[Future[Answer]] = deque()
        for message in messages:
            pending.append(self._threads.submit(self.ask, message))
            while pending and (pending[0].done() or len(pending) >= _AHEAD * self._count):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def ask(self, message: dict[str, Any]) -> Answer:
        """The answer to one message; `content` in it are bytes. Each thread that asks has a process to itself.

        Raises:
            LaunchError: a process cannot be started at all.
        """
        for number in range(self._limits.tries):
            process = self._take(fresh=number > 0)
            try:
                answer = process.ask(message, self._limits.deadline_s)
            except _LostError as error:
                self._drop(process)
                answer = {"code": error.code, "refused": str(error)}, b""
            except BaseException:  # its next answer would be the one to this message
                self._drop(process)
                raise
            else:
                with self._lock:
                    self._idle.append(process)
                return answer
        return answer

    def _take(self, *, fresh: bool) -> _Process:
        """An idle process, or a new one. One that died while idle is not to be blamed on the next message.

        With `fresh` always a new one: the kernel ends a process with the thread that started it, so where a loader's
        threads end, all that are idle may die, one after the other, under the same message.
        """
        with self._lock:
            idle = self._idle.pop() if self._idle else None
        if idle is not None and not fresh and idle.is_running():
            return idle
        if idle is not None:
            self._drop(idle)
        process = _Process(self._module, self._limits)
        with self._lock:
            self._processes.add(process)
            if self._is_closed:
                raise LaunchError("the sandbox was closed")
        return process

    def _drop(self, process: _Process) -> None:
        with self._lock:
            self._processes.discard(process)
        process.close()


class _LostError(Exception):
    """A process died or does not answer."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _Process:
    """A child and its pipes. Raises LaunchError, with the last line of its standard error, where it does not start."""

    def __init__(self, module: str, limits: Limits) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
        # Many processes share the cores: threads of each would only wait for one another.
        environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, json.dumps(asdict(limits))]
        with tempfile.TemporaryFile() as errors:  # the child lets go of it too, when it is ready
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
            assert self.child.stdin is not None
            assert self.child.stdout is not None
            self._requests, self._answers = self.child.stdin, self.child.stdout
            for pipe in (self._requests, self._answers):
                widen_pipe(pipe.fileno(), _PIPE_BYTES)
            self._poll = select.poll()  # `select.select` takes no descriptors above 1023
            self._poll.register(self._answers, select.POLLIN)
            try:
                self._receive(_START_S)
            except BaseException as error:
                self.close()
                if not isinstance(error, _LostError):
                    raise
                errors.seek(0)
                last = (errors.read().decode(errors="replace").strip().splitlines() or [str(error)])[-1]
                raise LaunchError(
                    f"a decoding process does not start: {last}; check the installation with `doctor`"
                ) from None

    def is_running(self) -> bool:
        return self.child.poll() is None

    def ask(self, message: dict[str, Any], deadline_s: float) -> Answer:
        fields = {name: value for name, value in message.items() if name != "content"}
        with contextlib.suppress(BrokenPipeError):  # it died: its answers end, which is seen when receiving
            _send(self._requests, fields, message.get("content", b""))
        return self._receive(deadline_s)

    def _receive(self, deadline_s: float) -> Answer:
        waited_s, tick_s = 0.0, min(_TICK_S, deadline_s)

        def read(size: int) -> bytes:
            nonlocal waited_s
            received = bytearray()
            while len(received) < size:
                if self._poll.poll(1000 * tick_s):
                    chunk = os.read(self._answers.fileno(), min(size - len(received), _PIPE_BYTES))
                    if not chunk:
                        raise _LostError("CRASH", f"the decoder crashed ({self._manner_of_death()})")
                    received += chunk
                    continue
                # Counted in ticks of silence: a parent that was stopped does not make its children late.
                waited_s += tick_s
                if waited_s >= deadline_s:
                    raise _LostError("TIMEOUT", f"decoding takes more than {deadline_s:g} s")
            return bytes(received)

        text_size, content_size = _HEADER.unpack(read(_HEADER.size))
        return json.loads(read(text_size)), read(content_size)

    def _manner_of_death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(_TICK_S)
        self.child.kill()  # it closed its pipe and lives on
        code = self.child.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self) -> None:
        self.child.kill()
        with contextlib.suppress(BrokenPipeError):  # it died with a message unread
            self._requests.close()
        self.child.wait()
        self._answers.close()


def serve(answer: Callable[[dict[str, Any]], Answer]) -> None:
    """In the child: answer the messages of standard input until there are no more; `argv[1]` are the limits."""
    limits = Limits(**json.loads(sys.argv[1]))
    # Both move out of a decoder's reach: whatever it prints goes nowhere, as it may quote files.
    with open(os.dup(0), "rb") as requests, open(os.dup(1), "wb") as answers:
        _confine(limits)
        _send(answers, {}, b"")
        while header := requests.read(_HEADER.size):
            text_size, content_size = _HEADER.unpack(header)
            message = json.loads(requests.read(text_size))
            if content_size:
                message["content"] = requests.read(content_size)
            try:
                reply = answer(message)
            except MemoryError:
                reply = {"code": "MEMORY", "refused": "decoding needs more memory than a decoding process may use"}, b""
            except Exception as error:  # StopIteration and whatever else a decoder leaks (docs/faults.md, B27)
                reply = {"code": "BROKEN", "refused": f"decoding failed ({type(error).__name__})"}, b""
            _send(answers, *reply)


def _send(pipe: IO[bytes], fields: dict[str, Any], content: bytes) -> None:
    text = json.dumps(fields).encode("ascii")
    pipe.write(_HEADER.pack(len(text), len(content)) + text)
    pipe.write(content)
    pipe.flush()


def _confine(limits: Limits) -> None:
    """Give up what reading a file does not need."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sys.dont_write_bytecode = True
    confine(
        memory_bytes=limits.memory_bytes,
        file_bytes=limits.file_bytes,
        cpu_s=limits.cpu_s,
        has_network=limits.has_network,
    )
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    if not limits.file_bytes:
        sys.addaudithook(_forbid)


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Binds Python code; what compiled decoders might do meets the limits above."""
    is_writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if is_writing or event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} is not for a decoding process")
