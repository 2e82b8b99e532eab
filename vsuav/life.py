"""Whether the script a restored clip belongs to is still there, and its log."""

import functools
import threading
import weakref
from collections.abc import Callable

import vapoursynth as vs

_lives: weakref.WeakSet["Life"] = weakref.WeakSet()


def lives_here() -> bool:
    """Whether a restored clip of this script is still there, which another clip may come from."""
    here = vs.get_current_environment()
    return any(life.environment == here for life in list(_lives))


class Life:
    """Whether the script a clip belongs to still lives, and its log. Made while the script's environment is active."""

    def __init__(self):
        self.environment = vs.get_current_environment()
        self._stopped = threading.Event()
        self._doubts: set[str] = set()
        vs.register_on_destroy(functools.partial(_stop, weakref.ref(self)))
        _lives.add(self)

    def watch(self) -> Callable[[], bool]:
        """Whether a request that comes now is still wanted, to be asked again and again.

        It is not once the environment is gone, or its outputs, there when this was called, were cleared. (VapourSynth
        tells of neither: requests that wait for a thread of its own begin after that, and are computed.)
        """
        shown = self._shown()
        return lambda: not self._stopped.is_set() and self.environment.alive and (not shown or self._shown())

    def _shown(self) -> bool:
        if not self.environment.alive:
            return False
        with self.environment.use():
            return bool(vs.get_outputs())

    def warn(self, line: str) -> None:
        """Write a line to VapourSynth's log."""
        self._log(vs.MESSAGE_TYPE_WARNING, line)

    def doubt(self, kind: str, line: str) -> None:
        """Write a warning, the first of its kind."""
        if kind not in self._doubts:
            self._doubts.add(kind)
            self.warn(line)

    def inform(self, line: str) -> None:
        """Write a line to VapourSynth's log, as information."""
        self._log(vs.MESSAGE_TYPE_INFORMATION, line)

    def stop(self) -> None:
        self._stopped.set()

    def _log(self, kind: vs.MessageType, line: str) -> None:
        if self.environment.alive:
            with self.environment.use():
                vs.core.log_message(kind, f"upscale: {line}")


def _stop(life: weakref.ref) -> None:
    if (living := life()) is not None:
        living.stop()
