"""Tables that tools write into the documentation, between two markers."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end -->"


def _begin(name: str) -> str:
    return f"<!-- table: {name} -->"


def table_in(page: str, name: str) -> str:
    """What stands between the markers of a table."""
    return page.split(_begin(name))[1].split(END)[0]


def write_table(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers; raises ValueError where there are none."""
    page = path.read_text("utf-8")
    begin = _begin(name)
    if page.count(begin) != 1 or END not in page.split(begin)[1]:
        raise ValueError(f"{path} has no {begin} followed by {END}; put the two lines where the table belongs.")
    before, rest = page.split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{END}{rest.split(END, 1)[1]}", "utf-8")
