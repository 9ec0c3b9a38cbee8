"""How limits are written: durations as OpenAI writes them."""

from router.quota_headers import duration


def test_durations_are_written_as_openai_does_and_never_too_short():
    shown = [duration(s) for s in (0, 0.0201, 0.5, 1, 1.5, 59.9999, 60, 61.25, 360)]
    assert shown == ["0s", "21ms", "500ms", "1s", "1.5s", "1m0s", "1m0s", "1m1.25s", "6m0s"]
