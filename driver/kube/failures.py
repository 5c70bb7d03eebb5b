"""What the API server can answer instead of what was asked, split by who must act.

ApiFailure
├── NotFound      the object is not there (any more)
├── Conflict      somebody else was faster, or the object was replaced: read again
├── Forbidden     RBAC or admission says no; an administrator acts
├── Invalid       the server does not take this content; carries the fields it names
├── Gone          the resourceVersion or continue token has expired: list again
├── Throttled     come back later; carries Retry-After
└── Unavailable   no usable answer: connection, time-out, 5xx, not JSON, token not accepted

Invariant: every failure of a request is one of these, and its text is the server's own, verbatim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from driver.errors import DriverError
from driver.kube.wire import Malformed, child, children, decode, text


class ApiFailure(DriverError):
    """A request that failed. what is like `get resourceclaims default/a`; status 0: no answer."""

    def __init__(self, what: str, status: int, message: str) -> None:
        self.what = what
        self.status = status
        self.message = message
        super().__init__(f"{what}: {status or 'no answer'}: {message}")


class NotFound(ApiFailure):
    pass


class Conflict(ApiFailure):
    pass


class Forbidden(ApiFailure):
    pass


class Gone(ApiFailure):
    pass


class Unavailable(ApiFailure):
    """dropped: the connection ended before an answer, as a kept-alive one does that the server closed."""

    def __init__(self, what: str, status: int, message: str, *, dropped: bool = False) -> None:
        super().__init__(what, status, message)
        self.dropped = dropped


class Invalid(ApiFailure):
    """fields are the paths the server names (`spec.devices[3].name`), possibly none."""

    def __init__(self, what: str, status: int, message: str, fields: tuple[str, ...] = ()) -> None:
        super().__init__(what, status, message)
        self.fields = fields


class Throttled(ApiFailure):
    """retry_after in seconds; 0 where the server gave none."""

    def __init__(self, what: str, status: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(what, status, message)
        self.retry_after = retry_after


_BY_STATUS: Mapping[int, type[ApiFailure]] = {403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone}


def from_answer(what: str, status: int, retry_after: str | None, body: bytes) -> ApiFailure:
    """The failure that an HTTP answer with this status stands for."""
    message = body[:2000].decode("utf-8", "replace").strip() or "empty answer"
    fields: tuple[str, ...] = ()
    with contextlib.suppress(Malformed):  # proxies and load balancers answer in HTML
        answer = decode(body, what)
        message = text(answer, "message") or message
        fields = tuple(text(cause, "field") for cause in children(child(answer, "details"), "causes"))
    return build(what, status, message, fields=fields, retry_after=_seconds(retry_after))


def build(
    what: str, status: int, message: str, *, fields: tuple[str, ...] = (), retry_after: float | None = None
) -> ApiFailure:
    """The failure for a status code; also used for the Status object of a watch's ERROR event."""
    if status == 429 or (retry_after is not None and status >= 500):
        return Throttled(what, status, message, retry_after or 0.0)
    if status in (400, 413, 415, 422):
        return Invalid(what, status, message, fields)
    if status == 401:
        return Unavailable(what, status, f"the token is not accepted: {message}")
    return _BY_STATUS.get(status, Unavailable)(what, status, message)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds, at most an hour; the HTTP-date form is not used by API servers."""
    if retry_after is None or not retry_after.isascii() or not retry_after.isdigit():
        return None
    return float(min(int(retry_after[:9]), 3600))
