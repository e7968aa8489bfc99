"""The command line as a test sees it."""

from __future__ import annotations

import re

import pytest

from acemerge.cli.app import main


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def failed(result: tuple[int, str, str], code: int, message: str) -> None:
    """One line on stderr in the form of the contract, nothing on stdout."""
    assert result[:2] == (code, ""), result
    assert re.fullmatch(r"acemerge: error: [^\n]+: [^\n]+; [^\n]+\n", result[2]), result[2]
    assert re.search(message, result[2]), result[2]
