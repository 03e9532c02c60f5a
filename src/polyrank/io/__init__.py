"""Run folders on disk: whole files, checked content, and what surrounds a result."""

from polyrank.io.runs import RunFolder

__all__ = ["RunFolder"]
