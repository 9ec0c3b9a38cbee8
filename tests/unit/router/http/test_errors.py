"""Replies to what failed: codes, and when to try again."""

from math import nan

from core.errors import (
    InvalidRequest,
    Overloaded,
    RateLimited,
    ServingError,
)
from router.http.errors import error_body, error_response


def test_error_replies_steer_the_clients_retries():
    refused = error_response(InvalidRequest("top_p", "is 7"), "id")
    assert (
        refused.status_code == 400
        and refused.headers["x-should-retry"] == "false"
        and refused.headers["x-request-id"] == "id"
    )
    full = error_response(Overloaded("full", retry_after_s=500.0), "")
    assert (
        full.headers["x-should-retry"] == "true"
        and full.headers["retry-after"] == "60"
        and "x-request-id" not in full.headers
    )
    assert error_response(RateLimited("slow"), "").headers["retry-after-ms"] == "1000"
    for wait_s, seconds, milliseconds in (
        (1.2, "2", "1200"),
        (0.0, "1", "1000"),
        (nan, "1", "1000"),
    ):
        headers = error_response(Overloaded("full", wait_s), "").headers
        assert (headers["retry-after"], headers["retry-after-ms"]) == (seconds, milliseconds)
    assert error_body(ValueError("secret"))["error"][
        "code"
    ] == "internal_error" and "secret" not in str(error_body(ValueError("secret")))
    odd = error_response(InvalidRequest("a\ud800", "is odd \ud800"), "")
    assert b"a?" in odd.body
    assert isinstance(InvalidRequest("a", "b"), ServingError)


def test_who_is_over_a_quota_is_told_exactly_when_to_come_back():
    for wait_s, shown in ((60.4, "61"), (0.2, "1")):
        refusal = error_response(RateLimited("later", wait_s), "")
        assert refusal.headers["retry-after"] == shown
        assert int(refusal.headers["retry-after-ms"]) >= wait_s * 1000
