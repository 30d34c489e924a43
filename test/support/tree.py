"""The files of the repository, as git tracks them, and Python ones parsed."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


@functools.cache
def tracked():
    """Return the tracked files of the repository, sorted."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached"],
                            cwd=ROOT, capture_output=True, check=True).stdout
    paths = {ROOT / name for name in listed.decode().split("\0") if name}
    return sorted(path for path in paths if path.is_file())


def texts():
    """Yield (path relative to the root, text) of every tracked text file."""
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            yield path.relative_to(ROOT), data.decode("utf-8")


def python_files():
    """Return {relative path: syntax tree} of the Python files: many megabytes, not to be kept for long."""
    paths = (path.relative_to(ROOT) for path in tracked() if path.suffix == ".py")
    return {path: ast.parse((ROOT / path).read_text("utf-8"), str(path)) for path in paths}
