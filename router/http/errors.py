"""OpenAI's error object, its status and the headers that steer a client's retries.

Owns the one translation from the error tree to HTTP, and notes each error on the call it answers.
Does not know routes.
"""

from __future__ import annotations

from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi.responses import JSONResponse

from core.errors import InternalError, InvalidRequest, ServingError
from router.calls import note, note_error
from router.refusals import retry_after_s

RETRIED = (429, 503)
"""openai-python retries 408, 409, 429 and 5xx unless a header forbids it; only these may help."""
REQUEST_ID_HEADER = "x-request-id"
CUT_STATE = "cut_with"
"""Key in a request's state under which the server's protocol leaves the error that cut its
connection, for the reply that is being sent."""


def error_body(error: Exception) -> dict[str, Any]:
    """Return OpenAI's error object; it shows nothing of an exception outside the error tree."""
    if not isinstance(error, ServingError):
        return _body("the server failed unexpectedly", "server_error", None, InternalError.code)
    kind = (
        "invalid_request_error"
        if error.http_status < HTTPStatus.INTERNAL_SERVER_ERROR
        else "server_error"
    )
    param = error.field if isinstance(error, InvalidRequest) else None
    return _body(error.message, kind, param, error.code)


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ServingError, request_id: str) -> JSONResponse:
    """Return error object, status and headers."""
    note_error(error)
    # OpenAI's clients obey this header before they look at the status.
    headers = {"x-should-retry": "true" if error.http_status in RETRIED else "false"}
    if request_id:
        headers[REQUEST_ID_HEADER] = request_id
    wait_s = retry_after_s(error)
    if wait_s is not None:
        headers |= {
            "Retry-After": str(ceil(wait_s)),
            # Both: OpenAI's clients read milliseconds, all others whole seconds.
            "retry-after-ms": str(round(wait_s * 1000)),
        }
    # Errors may quote what a client sent: a lone surrogate must not break the reply about it.
    body = error_body(error)
    body["error"]["message"] = body["error"]["message"].encode("utf-8", "replace").decode()
    if body["error"]["param"]:
        body["error"]["param"] = body["error"]["param"].encode("utf-8", "replace").decode()
    return JSONResponse(body, status_code=error.http_status, headers=headers)


def plain_error(
    status: int, message: str, code: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return an error of the HTTP layer itself: no such path, wrong method, a bug."""
    is_ours = status >= HTTPStatus.INTERNAL_SERVER_ERROR
    note(code, "failed" if is_ours else "rejected")
    return JSONResponse(
        plain_body(status, message, code),
        status_code=status,
        headers={**(headers or {}), "x-should-retry": "false"},
    )


def plain_body(status: int, message: str, code: str) -> dict[str, Any]:
    """Return the body of an error of the HTTP layer."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return _body(message, kind, None, code)
