"""Being asked to stop."""

from __future__ import annotations

import os
import signal


class StopSignal:
    """Whether this process was asked to stop: by SIGTERM, SIGINT or SIGUSR1, or because who started it is gone.

    Make it before anything slow, so that an early signal is remembered. Ranks share what it says once per update.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._parent = os.getppid()
        self._supervisor = int(os.environ.get("MOEPP_SUPERVISOR_PID", "0"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: object) -> None:
        self._signal = self._signal or signal.Signals(number)

    @property
    def reason(self) -> str | None:
        """Why this process is to stop, in words; None while it is not.

        Who started it, if gone: that one's end is why a supervisor would send SIGTERM. The other signals come from
        people and from SLURM, which send them to the launcher, too; it dies of them.
        """
        if self._signal in (signal.SIGINT, signal.SIGUSR1):
            return self._signal.name
        if os.getppid() != self._parent:
            return "its launcher is gone"
        if not _lives(self._supervisor):
            return "its supervisor is gone"
        return self._signal.name if self._signal else None

    @property
    def asked(self) -> bool:
        """Whether a signal is the reason."""
        return self._signal is not None and self.reason == self._signal.name

    def requested(self) -> bool:
        """True from the first signal on, or once DeepSpeed's launcher or the one of this project is gone."""
        return self.reason is not None


def _lives(pid: int) -> bool:
    """Whether process `pid` exists; 0 stands for one that is not to be watched."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
