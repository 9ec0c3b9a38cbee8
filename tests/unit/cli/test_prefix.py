"""`baton prefix explain`: a file that cannot be used is one line, and nobody is asked."""

import pytest
from typer.testing import CliRunner

from cli.main import app


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
