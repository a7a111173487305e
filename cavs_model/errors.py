"""The one exception for what a user can mend: it names the thing that is wrong and the valid choices."""

import errno
from collections.abc import Iterable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk without room; EFBIG: a process's own limit on file sizes


class InputError(Exception):
    """Bad input (file, field, value, environment). Commands print it as one line and exit with status 2."""


class OutageError(InputError):
    """What is wrong lies outside of what was asked for and may pass: a full disk, a store that does not answer.

    Nothing that met one has failed for good: the same command goes on when it is over.
    """


def unknown(kind: str, name: object, choices: Iterable[object]) -> InputError:
    """An InputError for a `name` that is none of the `choices` of its `kind`."""
    listed = ", ".join(str(choice) for choice in choices)
    return InputError(f"unknown {kind} {name!r}; choose one of: {listed}")
