"""The mutants that cannot be noticed, and why: with the site switched off the kernel is as right as before.

A key is the one that a failing test prints: file, function and code of the call, then those of the calls through which
it was inlined. A line that holds no site because the barrier of its helper was compiled away is listed by its own key.
What is listed and is noticed all the same, or is not there any more, fails a test.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, ...], str] = {}

# Kinds of sites that order nothing in the emulator by themselves (docs/emulator.md, "What it cannot show").
WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        ("__threadfence", "__threadfence_block", "__threadfence_system"),
        "the barrier or the launch that follows a fence is what orders memory here",
    ),
    "fence.mbarrier_init": "the barrier that must follow is what orders a use after the initialisation here",
}


def reason(kind: str, key: tuple[str, ...]) -> str | None:
    """Why a mutant cannot be noticed; None: it can."""
    return EQUIVALENT.get(key) or WITHOUT_EFFECT.get(kind)
