"""Processes started from nothing, quickly: children of one that has imported everything and made nothing."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["clips", "fakes", "vsuav.plugin", "vsuav.disk"])


def started(target: Callable, *arguments) -> tuple[BaseProcess, Connection]:
    """A fresh process that runs `target(*arguments, said)`, and where what it sends through `said` is heard."""
    heard, said = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=target, args=(*arguments, said))
    process.start()
    said.close()
    return process, heard
