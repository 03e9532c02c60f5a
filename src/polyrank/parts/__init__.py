"""Reusable pieces of methods, by axis."""
