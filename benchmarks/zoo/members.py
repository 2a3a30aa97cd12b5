"""Every member of the zoo, by name."""

from __future__ import annotations

from member import Member
from other_members import MEMBERS as OTHERS
from text_members import MEMBERS as TEXTS

MEMBERS: tuple[Member, ...] = (*TEXTS, *OTHERS)


def by_name(name: str) -> Member:
    """The member called `name`.

    Raises
    ------
    SystemExit
        If there is none.
    """
    for member in MEMBERS:
        if member.name == name:
            return member
    raise SystemExit(f"No member of the zoo is called {name!r}; there are: {', '.join(m.name for m in MEMBERS)}")
