"""What tests of methods need, ours and yours: tolerances, tiny models, the contract suite."""

from polyrank.testing.tolerance import TOL, assert_close

__all__ = ["TOL", "assert_close"]
