"""Which sources have changed, as far as git knows."""

from __future__ import annotations

import subprocess
from pathlib import Path

COMMITS = 5  # what counts as changed on main itself


def changed_files(root: Path, folder: str = "csrc") -> set[str]:
    """Files of a folder that differ from where this branch left main, or on main from COMMITS commits ago; those that
    are not committed yet included. None where there is no git, and those alone where it knows no earlier commit."""
    if _git(root, "rev-parse", "--show-prefix") != [""]:
        return set()  # no repository, or the folder of another one
    [head] = _git(root, "rev-parse", "HEAD") or [""]
    if not head:
        return set()
    base = head
    for main in ("origin/main", "main"):
        left_main = _git(root, "merge-base", "HEAD", main)
        if left_main:
            base = left_main[0]
            break
    if base == head:
        base = (_git(root, "rev-list", "--first-parent", f"--max-count={COMMITS + 1}", "HEAD") or [head])[-1]
    changed = _git(root, "diff", "--name-only", "--no-renames", base, "--", folder)
    return {*changed, *_git(root, "ls-files", "--others", "--exclude-standard", "--", folder)} - {""}


def _git(root: Path, *command: str) -> list[str]:
    """The lines that git answers; none where it cannot."""
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.removesuffix("\n").split("\n")
