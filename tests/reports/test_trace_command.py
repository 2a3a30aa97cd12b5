"""`tpplan trace`: what it prints, what it writes, and what it refuses before the work."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from tpplan.errors import UsageError
from tpplan.reports.output_files import write_whole
from tpplan.reports.trace_json import read_trace
from tpplan.reports.trace_table import trace_table


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, levels_source: str):
    """Run `tpplan trace` in a folder with the model levels.py: returns (exit code, stdout, stderr)."""
    from tpplan import cli

    (tmp_path / "levels.py").write_text(levels_source)
    monkeypatch.chdir(tmp_path)

    def invoke(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tpplan", "trace", *args])
        result = CliRunner().invoke(click.Command("tpplan", callback=cli.main), [], catch_exceptions=False)
        return result.exit_code, result.stdout, result.stderr

    return invoke


def table(models, name: str) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trace_table(*models[name], 2))
    return console.export_text()


def test_the_table_says_all(models) -> None:
    text = table(models, "nanogpt")
    row = next(line.split() for line in text.splitlines() if line.startswith("transformer.h.{0-3}"))
    assert row[1:3] == ["Block", "4"]
    assert "tied: transformer.wte.weight = lm_head.weight" in text
    assert "tensor parallel: 1, 2, 4;" in text
    assert "sequence parallel: possible" in text
    assert "unused: 2 trainable parameters: forgotten.weight, forgotten.bias" in table(models, "levels")


def test_the_table_names_opaque_parts_with_line_and_reason(models) -> None:
    graph, _ = models["routed"]
    text = " ".join(table(models, "routed").split())
    assert "opaque: " in text
    assert "routed.py, line 11" in text
    assert "nonzero makes sizes of data" in text
    assert f"{sum(share for *_, share in graph.opaque):.1%} of the FLOPs" in text


def test_it_writes_both_files_and_the_table(run, tmp_path: Path) -> None:
    code, out, err = run("levels.py", "--json", "g.json", "--svg", "g.svg")
    assert code == 0, err
    assert "first" in out
    assert "wrote g.svg" in err
    assert read_trace((tmp_path / "g.json").read_text()).name == "levels"
    ElementTree.parse(tmp_path / "g.svg")
    assert run("levels.py", "--svg", "g.svg")[0] == 0  # its own files may be written again


def test_stdout_is_the_json_and_nothing_else(run) -> None:
    code, out, _ = run("levels.py", "--json", "-", "--batch-size", "3", "--seq-len", "4")
    assert code == 0
    assert json.loads(out)["totals"]["batch_size"] == 3
    assert read_trace(out).sequence_length == 4


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["none.py", "--svg", "g.svg"], 2, "none.py"),
        (["levels.py", "--svg", "levels.py"], 2, "was not written by --svg"),
        (["levels.py", "--json", "levels.py"], 2, "was not written by --json"),
        (["levels.py", "--json", "no/g.json"], 2, "There is no folder"),
        (["levels.py", "--svg", "."], 2, "is a folder"),
        (["levels.py", "--svg", "g", "--json", "g"], 2, "both name g"),
        (["levels.py", "--svg", "-", "--format", "json"], 2, "stdout"),
        (["levels.py", "--seq-len", "0"], 2, "--seq-len is 0"),
        (["levels.py", "--model-arg", "levels=-1", "--model-arg", "depth=1"], 2, "depth"),
        (["levels.py", "--input", "x=float32[B,S,17]", "--svg", "g.svg"], 4, "levels.py"),
    ],
)
def test_errors_are_short_and_leave_no_file(
    run, tmp_path: Path, args: list[str], code: int, said: str, levels_source: str
) -> None:
    outcome, out, err = run(*args)
    assert (outcome, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"levels.py"}
    assert (tmp_path / "levels.py").read_text() == levels_source


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "g.svg"
    write_whole(file, "old", "--svg")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UsageError, match="No space left"):
        write_whole(file, "new", "--svg")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
