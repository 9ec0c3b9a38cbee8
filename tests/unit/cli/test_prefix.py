"""`baton prefix explain`: a file that cannot be used is one line; columns have the help's names."""

import pytest
from typer.testing import CliRunner

from cli.main import app
from client.endpoints import Endpoints


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"\xff", "no text"), (b"{", "no JSON"), (b'"x"', "no JSON list")],
)
@pytest.mark.parametrize("option", ["--ids", "--messages"])
def test_a_file_that_holds_no_list_is_refused_by_name(tmp_path, option, content, words):
    file = tmp_path / "prompt.json"
    if content is not None:
        file.write_bytes(content)
    run = CliRunner().invoke(app, ["prefix", "explain", option, str(file)], terminal_width=200)
    assert run.exit_code == 2 and words in " ".join(run.output.split()), run.output


def test_a_text_that_is_not_there_is_refused_by_name(tmp_path):
    run = CliRunner().invoke(app, ["prefix", "explain", f"@{tmp_path / 'none'}"])
    assert run.exit_code == 2 and isinstance(run.exception, SystemExit), run.output


def test_what_workers_hold_is_shown_under_the_names_that_the_help_explains(monkeypatch):
    found = {
        "prompt_tokens": 100,
        "blocks": [{"num_blocks": 6, "block_size_tokens": 16}],
        "workers": [
            {
                "worker": "prefill-1",
                "role": "prefill",
                "leading_blocks": 3,
                "leading_tokens": 48,
                "storage": {"pool": 2, "disk": 1},
                "expected_blocks": 2,
            }
        ],
        "error": "no worker is ready",
    }
    monkeypatch.setattr(Endpoints, "post", lambda *_: found)
    shown = CliRunner().invoke(app, ["prefix", "explain", "hello"], terminal_width=200).output
    header, *_, row = [line.split() for line in shown.splitlines() if line.strip()][1:4]
    assert header == ["worker", "role", "blocks", "tokens", "storage", "expected"]
    assert row == ["prefill-1", "prefill", "3", "48", "pool", "2,", "disk", "1", "2"]
    helped = {
        command: " ".join(CliRunner().invoke(app, [*command.split(), "--help"]).output.split())
        for command in ("prefix explain", "explain request")
    }
    assert "expected" in helped["prefix explain"] and "storage tier" in helped["prefix explain"]
    assert "weighed" in helped["explain request"]
