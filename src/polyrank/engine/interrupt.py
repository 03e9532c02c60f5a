"""SIGINT and SIGTERM while a run goes on: it stops at the next place where it can be saved."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """SIGINT stopped the run in `run_folder`."""

    def __init__(self, run_folder: Path) -> None:
        super().__init__()
        self.run_folder = run_folder


class Terminated(SystemExit):
    """SIGTERM stopped the run in `run_folder`; exit code 143."""

    def __init__(self, run_folder: Path) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.run_folder = run_folder


class Interrupts:
    """Notes the first signal; a second one stops at once.

    Args:
        folder: of the run, for whoever tells the user how to go on.

    Attributes:
        asked: the signal that came, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        # Python lets the main thread alone choose what a signal does.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self.stop()
        self.asked = number

    def stop(self) -> None:
        """End as the signal wants it: KeyboardInterrupt, or SystemExit with 143."""
        raise (Terminated if self.asked == signal.SIGTERM else Interrupted)(self.folder)
