"""The one actor class of raysys: a process that takes on a role.

Starting a process costs seconds (imports), giving it another role does not; so a job of many runs starts its processes once.
The role's own code is imported when it is taken on, and this module imports nothing, so that an idle process is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.host import Host


class Process:
    """Runs the methods of its current role, one after the other in the order of the calls."""

    def become(self, role: type[Host], *args: Any) -> None:
        """Drop the old role and build a new one; if that fails there is none."""
        self.role: Host | None = None
        self.role = role(*args)

    def do(self, method: str, *args: Any) -> Any:
        """Call a method of the role."""
        return getattr(self.role, method)(*args)
