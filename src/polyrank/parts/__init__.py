"""Reusable pieces of methods, one module an axis."""

from polyrank.parts import catalogue, cores, inits, losses, mixtures, routers, rules

__all__ = ["catalogue", "cores", "inits", "losses", "mixtures", "routers", "rules"]
