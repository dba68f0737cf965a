"""Map one function over many items: on threads of this machine, or on a Dask cluster. Same function, same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TypeVar

from ixi_etl.errors import IxiError

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    address: str | None = None,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """`[function(item) for item in items]`, in parallel; `on_done` is told how many are done.

    `address` is that of a Dask scheduler, whose workers must see the same files; without one, `workers` threads.
    """
    return _on_cluster(function, items, address, on_done) if address else _on_threads(function, items, workers, on_done)


def _on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, on_done: Callable[[int], None]
) -> list[Result]:
    from dask.base import compute
    from dask.delayed import delayed

    lock, done = Lock(), 0

    def counted(item: Item) -> Result:
        nonlocal done
        result = function(item)
        with lock:
            done += 1
            on_done(done)
        return result

    tasks = [delayed(counted, pure=False)(item) for item in items]
    return list(compute(*tasks, scheduler="threads", num_workers=workers))


def _on_cluster(
    function: Callable[[Item], Result], items: Sequence[Item], address: str, on_done: Callable[[int], None]
) -> list[Result]:
    from distributed import Client, as_completed

    try:
        client = Client(address, timeout=20)
    except (OSError, TimeoutError, ValueError) as error:
        raise IxiError(f"no Dask scheduler answers at {address} ({error}); start one, or leave --dask out") from error
    with client:
        futures = client.map(function, items, pure=False)
        for done, _ in enumerate(as_completed(futures), 1):
            on_done(done)
        return list(client.gather(futures))
