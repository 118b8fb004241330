"""What a reward worker prints: beside the run until there is a run to keep it, then in a file of its `errors/`."""

import os
import tempfile
from pathlib import Path

_LIMIT = 10 * 2**20


class WorkerLog:
    """The standard error of one function's workers.

    Workers start while the model loads, before anybody knows that there will be a run. So they print to a file without
    a name, which ends with this process, and `keep` appends what is new to `path`: a run that is refused leaves nothing
    behind.

    Args:
        path: None: workers print where the trainer does, and nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        descriptor, name = tempfile.mkstemp()
        # Opened to append: the worker goes on at the end, whatever was cut off here.
        self._file = open(name, "ab+", buffering=0)  # noqa: SIM115 - lives as long as the workers
        os.close(descriptor)
        os.unlink(name)
        self._kept = 0

    @property
    def stderr(self) -> int | None:
        """Where a worker's standard error goes, for `subprocess`."""
        return None if self.path is None else self._file.fileno()

    def keep(self) -> None:
        """Append what came since the last time to `path`; past 10 MiB the file begins anew."""
        size = os.fstat(self._file.fileno()).st_size
        if self.path is not None and size > self._kept:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(os.pread(self._file.fileno(), size - self._kept, self._kept))
                if file.tell() > _LIMIT:
                    file.truncate(0)
        self._kept = size
        if size > _LIMIT:
            os.truncate(self._file.fileno(), 0)
            self._kept = 0

    def tail(self) -> str:
        """The last words."""
        size = os.fstat(self._file.fileno()).st_size
        return os.pread(self._file.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
