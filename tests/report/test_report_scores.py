"""Scores on the report page: those of `acemerge evaluate` and `compare`, with their intervals, or one line of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import PlainModel
from commands import failed, run
from report_pages import Page, content, evaluation

import acemerge
from acemerge.errors import CheckpointError
from acemerge.report.scores import find_scores, scores_of
from acemerge.report.write import write_report

HOSTILE = "</script><script>document.title='owned'</script>"


def test_the_cells_are_those_of_the_table_that_the_evaluation_prints(tmp_path: Path) -> None:
    models = {"base": "b", "ace": str(tmp_path / "out")}
    found = scores_of(content(models), tmp_path / "evaluation.json", tmp_path / "out")
    header, rows = evaluation(list(models)).cells()
    assert ["", *found.tasks, "mean", "of experts"] == header
    assert [[name, *cells] for name, cells in found.rows] == [
        [cell.replace("-", "", cell == "-") for cell in r] for r in rows
    ]
    assert found.merged == "ace"


def test_points_are_percent_and_perplexities_as_they_are(tmp_path: Path) -> None:
    table = content({"base": "b", "ace": str(tmp_path / "out")})
    found = scores_of(table, tmp_path / "evaluation.json", tmp_path / "out")
    points = {(point["model"], point["task"]): point for point in found.points}
    assert len(points) == 2 + 2 * 3
    for (model, task), point in points.items():
        score, unit = table["rows"][model]["tasks"][task], 1 if task == "text8" else 100
        assert (point["score"], point["low"], point["high"]) == (
            unit * score["score"], unit * score["interval"][0], unit * score["interval"][1]
        )  # fmt: skip
        assert (point["kind"] == "perplexity") is (task == "text8")
        assert point["merged"] is (model == "ace")


def test_they_are_found_in_the_output_or_given(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = plain.save()
    out = plain.root / "out"
    acemerge.merge(base, experts, out=out)
    assert 'id="scores"' not in write_report(out).read_text()
    models = {"base": str(base), HOSTILE: str(out)}
    beside = plain.root / "scores"
    beside.mkdir()
    (beside / "evaluation.json").write_text(json.dumps(content(models)))
    assert run(capsys, "report", out, "--scores", beside / "evaluation.json", "--quiet") == (0, "", "")
    page = Page((out / "report.html").read_text())
    assert f"{HOSTILE} (this merge)" in page.text
    assert {point["model"] for point in json.loads(page.data)["scores"]} == {*models, "experts"}
    assert [a.get("id") for tag, a in page.tags if tag == "script"] == ["data", None, None]
    (out / "evaluation.json").write_text(json.dumps(content({"base": str(base)})))
    assert "None of the models is named as this output" in Page(write_report(out).read_text()).text
    assert find_scores(out, beside) is not None  # the folder will do
    failed(run(capsys, "report", out, "--scores", plain.root / "none.json"), 3, "no such file; name the evaluation")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda table: [], "its beginning"),
        (lambda table: table | {"format": "acemerge-evaluation-9"}, "format"),
        (lambda table: table | {"rows": {"ace": {"tasks": {"a": {"score": 1.0}}}}}, "interval"),
        (lambda table: table | {"models": ["ace"]}, "models"),
    ],
)
def test_what_is_no_evaluation_is_refused(change: Any, place: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(change(content({"ace": "x"}))))
    with pytest.raises(CheckpointError, match=rf"is no evaluation: .*{place}"):
        find_scores(tmp_path, None)
