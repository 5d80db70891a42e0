"""Several event streams as one."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from engine.types import Event


async def merge(
    streams: Sequence[AsyncGenerator[Event, None]],
    tick: float,
    end: "asyncio.Future[Exception]",
    came: Callable[[int, Event], None],
) -> AsyncGenerator[tuple[int, Event] | None, None]:
    """Yields (index, event) as events come, and None after each `tick` seconds without one; ends with the last stream.

    Holds at most one event per stream, so a slow reader slows the producers down. `came` is called when an event comes,
    which may be long before it is yielded. Raises the first exception of any stream. A result of `end`, an exception,
    ends all streams and is raised. Closing this generator closes them all.
    """
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(maxsize=1)

    async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    came(index, event)
                    await queue.put((index, event))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]

    def break_off(end: "asyncio.Future[Exception]") -> None:
        for task in tasks:
            task.cancel()
        tasks.append(asyncio.create_task(queue.put((0, end.result()))))

    end.add_done_callback(break_off)
    try:
        left = len(streams)
        while left:
            try:
                async with asyncio.timeout(tick):
                    index, event = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            else:
                yield index, event
    finally:
        end.remove_done_callback(break_off)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
