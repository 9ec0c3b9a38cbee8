"""Placement at one instant: most tests of it know no time."""

from functools import partial

from router import placement

choose = partial(placement.choose, now_s=0.0)
"""As `router.placement.choose`, on a clock that shows 0 unless a test says otherwise."""
