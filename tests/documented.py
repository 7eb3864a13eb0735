"""The commands and the Python of README and docs, as a reader finds them."""

import re
import shlex
from pathlib import Path

from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(r"(?:tcl-hf|-m tcl_hf) ((?:--)?[a-z]+.*)")


def shell_lines_of(page: Path) -> list[str]:
    """The lines of the shell blocks of a page, without comments, and with continued lines in one."""
    text = page.read_text(encoding="utf-8")
    lines: list[str] = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def words_of(line: str) -> list[str]:
    """The words after `tcl-hf` or `-m tcl_hf` in a line; empty if it has none, or leaves something out."""
    match = OURS.search(line)
    if not match or "..." in match[1]:
        return []
    command = re.split(r" (?:>|&&|\|) ", match[1])[0]
    # A command within that of another shell has the arguments of that behind it, or ends with its mark.
    command = command.replace('"$@"\' run', "")
    return shlex.split(command.rstrip("'") if command.count("'") % 2 else command)


def commands_of(page: Path) -> list[list[str]]:
    """The words of each `tcl-hf` command in the shell blocks and in the code marks of a page."""
    marks = re.findall(r"`(tcl-hf [^`\n]+)`", page.read_text(encoding="utf-8"))
    return [words for words in map(words_of, [*shell_lines_of(page), *marks]) if words]


def snippets_of(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
