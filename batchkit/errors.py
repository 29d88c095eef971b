"""Everything that batchkit raises on purpose.

    BatchkitError                 stops a stage; the command line prints it as `Error: …` and exits with 1
    ├── UsageError                options that contradict each other or the run (exit 2)
    ├── InputError                the user's files: missing, unreadable, of the wrong kind
    ├── StorageError              reading or writing failed (disk full, permission, network)
    ├── RunError                  the run directory: not one, of another version, damaged, other options
    │   └── RunBusyError          another process holds what we need
    ├── EngineError               an engine or server that does not start, or dies again and again
    └── ServiceError              a provider that refuses what it is asked
        └── CredentialsError      no key, or one that it does not take (exit 4)

What concerns one row is never raised past the stage: it becomes a verdict. `RowError` carries it from where it
is found to where it is counted.
"""

from __future__ import annotations


class BatchkitError(Exception):
    """Stops the stage. `message` says what is wrong, `hint` the next thing to do or to type."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.detail = detail


class UsageError(BatchkitError):
    exit_code = 2


class InputError(BatchkitError):
    pass


class StorageError(BatchkitError):
    pass


class RunError(BatchkitError):
    pass


class RunBusyError(RunError):
    pass


class EngineError(BatchkitError):
    """`detail` holds the end of the engine's own log."""


class ServiceError(BatchkitError):
    pass


class CredentialsError(ServiceError):
    exit_code = 4


LONGEST_MESSAGE = 1000
"""Of a row, in characters: it may quote the row, which may be of any size."""


class RowError(Exception):
    """A row that cannot become a request. `code` is one word for counting, `message` is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + "…"
