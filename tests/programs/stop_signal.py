"""Answers each line on its input with why it is to stop, or `None`. The first line it prints is its process id."""

from __future__ import annotations

import os
import sys

from moepp_ds.stop import StopSignal


def main() -> None:
    stop = StopSignal()
    print(os.getpid(), flush=True)
    while sys.stdin.readline():
        print(stop.reason, stop.asked, stop.requested(), flush=True)


if __name__ == "__main__":
    main()
