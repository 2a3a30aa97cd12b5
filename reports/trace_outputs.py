"""Where `tpplan trace` writes what: the table or the totals, the JSON file, the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..errors import UsageError
from ..planner.graph import ModelGraph
from ..planner.sharding import Sharding
from .graph_svg import SVG_MARK, graph_svg
from .output_files import check_output, write_whole
from .trace_json import JSON_MARK, trace_json
from .trace_table import trace_table

_STDOUT = Path("-")


@dataclass(frozen=True, slots=True)
class TraceOutputs:
    """What the user asked for: files (or "-", which is stdout), and the format of what stdout gets otherwise."""

    json_file: Path | None
    svg_file: Path | None
    format: str

    def check(self) -> None:
        """Refuse destinations that cannot be written, before the model is traced.

        Raises
        ------
        UsageError
            If two things are to go to one place, or a file must not be written.
        """
        if self.json_file is not None and self.json_file == self.svg_file:
            raise UsageError(f"--json and --svg both name {self.json_file}.", "Give them two different files.")
        if self._to_stdout() and self.format == "json":
            raise UsageError("--format json and a file - both write to stdout.", "Give a file name instead of -.")
        for path, mark, flag in ((self.json_file, JSON_MARK, "--json"), (self.svg_file, SVG_MARK, "--svg")):
            if path is not None and path != _STDOUT:
                check_output(path, mark, flag)

    def write(self, graph: ModelGraph, sharding: Sharding, batch: int, console: Console) -> Iterator[Path]:
        """Write everything; yields the files written.

        Raises
        ------
        UsageError
            If a file cannot be written.
        """
        texts = []
        if self.json_file is not None:
            texts.append((self.json_file, "--json", trace_json(graph, sharding, batch)))
        if self.svg_file is not None:
            texts.append((self.svg_file, "--svg", graph_svg(graph, sharding, batch)))
        for path, flag, text in texts:
            if path == _STDOUT:
                console.file.write(text)
            else:
                write_whole(path, text, flag)
                yield path
        if self.format == "json":
            console.file.write(json.dumps(graph.summary(batch), indent=2) + "\n")
        elif not self._to_stdout():
            console.print(trace_table(graph, sharding, batch))

    def _to_stdout(self) -> bool:
        return _STDOUT in (self.json_file, self.svg_file)
