"""Who discovery tells of workers, in tests."""

from dataclasses import dataclass, field

from router.fleet.discovery import Member


@dataclass
class Told:
    """Keeps what it is told, and refuses what a fleet could make no sense of."""

    members: dict[str, Member] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)

    def add(self, address: str, member: Member) -> None:
        assert address not in self.members
        self.members[address] = member
        self.changes.append(f"+{address}")

    def update(self, address: str, member: Member) -> None:
        assert self.members[address] != member
        self.members[address] = member
        self.changes.append(f"~{address}")

    def remove(self, address: str) -> None:
        del self.members[address]
        self.changes.append(f"-{address}")
