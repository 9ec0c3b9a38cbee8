"""What a planted bug is: a place in the code, the old text, and what has to notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """Replace `old` by `new` once in `path`; `by` must fail then."""

    name: str
    path: str
    old: str
    new: str
    by: str
