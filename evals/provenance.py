"""Where a number is from: date, machine and commit, without which none of them is worth quoting."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def provenance(*written: str) -> dict[str, Any]:
    """Date (UTC), processor, cores that this process may use, memory, and the commit of this checkout.

    written: tracked files that the measurement itself writes, which do not count as changes.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "commit": commit(*written),
    }


def commit(*written: str) -> str:
    """Short hash of the commit that is checked out, "+ changes" if tracked files differ from it, `written` aside."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{w}" for w in written)))
    return (git("rev-parse", "--short", "HEAD") or "unknown commit") + (" + changes" if changed else "")


def in_words(here: dict[str, Any]) -> str:
    """One line for the top of a table."""
    memory = f"{here['memory_bytes'] / 2**30:.0f} GiB"
    return f"{here['date']}, commit {here['commit']}, {here['cpu']}, {here['cores']} cores, {memory}"
