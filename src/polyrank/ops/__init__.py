"""Tensors in, tensors out: one folder per operator, its plain reference in `naive.py`."""

__all__: list[str] = []
