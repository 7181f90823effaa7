"""The mutants that cannot be noticed, and why: with the site switched off the kernel is as right as before.

A key is the one that a failing test prints: file, function and code of the call, then those of the calls through which
it was inlined. A line that holds no site because the barrier of its helper was compiled away is listed by its own key.
What is listed and is noticed all the same, or is not there any more, fails a test.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, ...], str] = {}
