"""One process at a time in a run's folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from hf_ssl_or.errors import InputError


class RunLock:
    """Holds a run's folder for this process, until released, or until the process ends in whatever way.

    Args:
        run_dir: Folder of the run; made if absent.

    Raises:
        InputError: Another process holds it, or it cannot be locked.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir = Path(run_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = (run_dir / ".lock").open("a+")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise InputError(f"{run_dir}: in use by {holder}; wait for it, or choose another run folder") from error
        except OSError as error:
            raise InputError(f"{run_dir}: cannot be locked ({error.strerror})") from error
        os.register_at_fork(after_in_child=self._file.close)  # else an orphaned worker would keep holding the lock

    def release(self) -> None:
        """Lets the folder go."""
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
