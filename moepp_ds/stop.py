"""Being asked to stop."""

from __future__ import annotations

import os
import signal


class StopSignal:
    """Whether this process was asked to stop: by SIGTERM, SIGINT or SIGUSR1, or because who started it is gone.

    Make it before anything slow, so that an early signal is remembered. Ranks share what it says once per update.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._parent = os.getppid()
        self._supervisor = int(os.environ.get("MOEPP_SUPERVISOR_PID", "0"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, *_: object) -> None:
        self._signalled = True

    def requested(self) -> bool:
        """True from the first signal on, or once DeepSpeed's launcher or the one of this project is gone."""
        return self._signalled or os.getppid() != self._parent or not _lives(self._supervisor)


def _lives(pid: int) -> bool:
    """Whether process `pid` exists; 0 stands for one that is not to be watched."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
