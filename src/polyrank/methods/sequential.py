"""Sequential: one adapter goes through the tasks in their order, and nothing else is done.

Idea: the floor of every comparison; whatever a method adds must beat it.
Maths: none.
Source: the naive baseline of continual learning, arXiv:2302.00487, section 2.
Differs from the released code: there is none.
Limits: forgets. Cost: none.
Status: works.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.frame import Strategy, register


@register
@dataclass(frozen=True, kw_only=True)
class Sequential(Strategy):
    """Train on one task after another."""
