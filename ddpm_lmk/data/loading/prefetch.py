"""Makes things ahead of the one in use, in one thread and in order, and tells how long it was waited for."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

DEPTH = 2  # groups, or evaluation batches, made ahead of the one in use

Request = TypeVar("Request")
Made = TypeVar("Made")


def ahead(
    make: Callable[[Request], Made], requests: Iterator[Request], *, in_thread: bool
) -> Iterator[tuple[Made, float]]:
    """`make` of every request, in order, and the seconds waited for it; without a thread each is made when asked."""
    if not in_thread:
        for request in requests:
            began = time.perf_counter()
            yield make(request), time.perf_counter() - began
        return
    with ThreadPoolExecutor(1, "prefetch") as thread:
        pending = deque(thread.submit(make, request) for request in itertools.islice(requests, DEPTH))
        try:
            while pending:
                began = time.perf_counter()
                made = pending.popleft().result()
                waited = time.perf_counter() - began
                pending.extend(thread.submit(make, request) for request in itertools.islice(requests, 1))
                yield made, waited
        finally:
            for future in pending:
                future.cancel()
