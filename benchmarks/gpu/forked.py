"""A function in a fork of this process, with a time limit: one that hangs, or breaks its CUDA context, ends alone."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


class Failed(Exception):
    """The fork did not come to its end; its text says why."""


def forked(function: Callable[..., Iterator[Any]], *args: Any, limit_s: float) -> Iterator[Any]:
    """What function(*args) yields there, as it comes.

    Raises Failed with the last line of its traceback, or if it died or ran for longer than limit_s seconds. It and all
    that it has started are then killed. Call it before anything runs on a GPU here: a fork could not use one then.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(writer, function, args))
    end = time.monotonic() + limit_s
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of libraries that have nothing to do now
        process.start()
    writer.close()
    try:
        while reader.poll(max(0.0, end - time.monotonic())):
            kind, content = reader.recv()
            if kind == "end":
                return
            if kind == "failed":
                raise Failed(content)
            yield content
        raise Failed(f"stopped after its {limit_s:.0f} s")
    except EOFError:
        process.join()
        raise Failed(f"died with exit code {process.exitcode}") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _work(writer: Connection, function: Callable[..., Iterator[Any]], args: tuple) -> None:
    os.setpgid(0, 0)  # with its data workers and ranks it is ended as one
    try:
        for item in function(*args):
            writer.send(("item", item))
        writer.send(("end", None))
    except BaseException as error:
        traceback.print_exc()
        writer.send(("failed", f"{type(error).__name__}: {error}"[:500]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a broken CUDA context may not let the interpreter end
