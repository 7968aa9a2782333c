"""Finished rows of a measurement, a JSON object a line: an interrupted one goes on where it was."""

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path, key: tuple[str, ...]) -> dict[tuple, dict[str, Any]]:
    """The rows that have these fields, by their values; half a line of a killed run is none."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if all(name in row for name in key):
            rows[tuple(row[name] for name in key)] = row
    return rows


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Adds a row, on a line of its own also after half a line."""
    path = Path(path)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write(f"{'' if whole else chr(10)}{json.dumps(row)}\n")
