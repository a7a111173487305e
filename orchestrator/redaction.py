"""What is printed, logged or kept never holds a secret: not the user and password of a URI, not a token of the environment.

A driver's errors repeat the URI they were given (SQLAlchemy, HTTP, file systems), and so do command lines. Whatever text of
that kind leaves the process goes through `redacted` first.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import TracebackType
from urllib.parse import quote, unquote

HIDDEN = "***"
SHORTEST, SHORTEST_OF_ENVIRONMENT = 4, 6  # a shorter value is part of ordinary words

_CREDENTIALS = re.compile(r"(?<=://)(?!/)[^\s'\"<>|]*@")  # up to the last "@": a password may hold others, and slashes
_BARE = re.compile(r"(?<![\w/.-])[\w.+-]+:[^\s'\"@/]+@(?=[\w.\[])")  # user:password@host where the scheme was forgotten
# All but MLflow's name for the view of a table, which is in the link that every verb prints.
_OPTION = re.compile(r"(?i)([?&;](?!viewStateShareKey=)[\w.-]*(?:pass|pwd|secret|token|key|sig)[\w.-]*=)[^\s&;#'\"]+")
_SECRET_NAME = re.compile(r"(?i)(passw|pwd|secret|token|api_?key|access_?key|private_?key|credential|connection_?string)")
_FIGURE = re.compile(r"(?i)true|false|yes|no|none|\d{1,6}")  # RAY_..._TOKEN_RATE=100 and its kind are no secrets
_URI = re.compile(r"://(?!/)([^\s'\"<>|]*)@")


def redacted(text: str) -> str:
    """The text without credentials of URIs, options such as "?password=...", and values of secret environment variables."""
    text = _OPTION.sub(rf"\g<1>{HIDDEN}", _BARE.sub("", _CREDENTIALS.sub("", text)))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> list[str]:
    """Secret values of the environment, as they stand there and as a URI or a driver writes them; the longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if (
            len(value) >= SHORTEST_OF_ENVIRONMENT
            and _SECRET_NAME.search(name)
            and not _FIGURE.fullmatch(value)
            and not os.path.exists(value)
        ):
            found |= {value, quote(value, safe=""), unquote(value)}
        for credentials in _URI.findall(value):
            password = credentials.partition(":")[2]
            found |= {password, unquote(password)}
    return sorted((each for each in found if len(each) >= SHORTEST), key=lambda each: (-len(each), each))


def redacted_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own report of an error that nobody caught, without secrets: for `sys.excepthook`."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
