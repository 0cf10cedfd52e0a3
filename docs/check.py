"""Check the documentation: generated text is what its generator makes, links resolve, and examples of code are valid.

python docs/check.py; with ``--skip localizers`` without the generators whose commands hold a word
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"[Mm]ade by `(python docs/[^`]+)`")
PARAGRAPH = re.compile(r"[Mm]ade by `python docs/.*?(?=\n\s*\n|\Z)", re.DOTALL)  # names versions, which may differ
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+\s+(.+?)\s*$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip", nargs="*", default=[], help="leave out the generators whose commands hold a word")
    args = parser.parse_args()
    files = tracked("*.md")
    commands = {command for file in files for command in COMMAND.findall(text_of(ROOT / file))}
    commands = {command for command in commands if not any(word in command for word in args.skip)}
    problems = [*stale(files, sorted(commands)), *broken_links(files), *invalid_code(files)]
    ran = "".join(f"\n  {command}" for command in sorted(commands)) or " none"
    print(
        "\n".join(problems) or f"{len(files)} files: links and code are as they should be; generators that agree:{ran}"
    )
    sys.exit(bool(problems))


def tracked(*patterns: str) -> list[Path]:
    """Return the files of the checkout that match, by paths relative to it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for line in listed.splitlines() if (ROOT / (path := Path(line))).is_file()]


def stale(files: list[Path], commands: list[str]) -> Iterator[str]:
    """Make the generated pages again in a copy of the checkout, by the commands that they name."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in tracked():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy / path)
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONWARNINGS": "ignore"}
        for command in commands:
            with_this_python = command.replace("python", f'"{sys.executable}"', 1)
            done = subprocess.run(["bash", "-c", with_this_python], cwd=copy, env=environment, check=False)
            if done.returncode:
                yield f"`{command}` failed"
        for file in files:
            before, after = (PARAGRAPH.sub("", text_of(base / file)) for base in (ROOT, copy))
            if before != after:
                lines = zip([*before.splitlines(), ""], [*after.splitlines(), ""], strict=False)
                first = next(((old, new) for old, new in lines if old != new), ("", "more lines"))
                yield f"{file}: is not what its generator makes, first:\n  - {first[0]}\n  + {first[1]}"


def broken_links(files: list[Path]) -> Iterator[str]:
    """Find links to files and headings that are not in the checkout."""
    for file in files:
        for target in LINK.findall(CODE.sub("", text_of(ROOT / file))):
            if re.match(r"\w+:", target):  # another site
                continue
            path, _, anchor = target.partition("#")
            linked = (ROOT / file).parent / path if path else ROOT / file
            if not linked.exists():
                yield f"{file}: there is no file {target}"
            elif anchor and linked.suffix == ".md" and anchor not in anchors(text_of(linked)):
                yield f"{file}: there is no heading {target}"


def anchors(text: str) -> set[str]:
    headings = (re.sub(r"[`*]", "", heading).lower() for heading in HEADING.findall(CODE.sub("", text)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def invalid_code(files: list[Path]) -> Iterator[str]:
    """Find blocks of Python that do not parse."""
    for file in files:
        for language, code in CODE.findall(text_of(ROOT / file)):
            if language in ("python", "py"):
                try:
                    ast.parse(textwrap.dedent(code))
                except SyntaxError as error:
                    yield f"{file}: Python that does not parse: {error.msg}: {(error.text or '').strip()}"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
