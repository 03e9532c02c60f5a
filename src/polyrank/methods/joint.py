"""Joint: one adapter trains on the data of all tasks at once.

Idea: the ceiling of a comparison; it sees at the same time what a stream shows one by one.
Maths: none.
Source: the multi-task reference of continual learning, arXiv:2302.00487, section 2.
Differs from the released code: there is none.
Limits: needs the data of all tasks, so it is no continual learner. Only the last row of its
    matrices is measured. Cost: as many updates as the tasks of the stream together.
Status: works.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.frame import Strategy, register


@register
@dataclass(frozen=True, kw_only=True)
class Joint(Strategy):
    """Train on all tasks at once."""

    pools = True
