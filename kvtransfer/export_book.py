"""Which exports and links prefill has, and how ended ones ended.

Used by `export.py` alone, which decides when. Invariant: a key is at one time exported, or ended
(as long as that is remembered), or claimed early; the blocks of an export go out once, at its end.
"""

from collections import OrderedDict
from dataclasses import dataclass

from core.errors import ErrorCode
from kvtransfer.actions import ExportAction, FreeBlocks, Send
from kvtransfer.export_record import ClaimLink, Export
from kvtransfer.messages import Key, Revoke


@dataclass(frozen=True, slots=True)
class Ending:
    """Why there will be no hand-over, for who asks later."""

    code: ErrorCode
    message: str
    told: bool = True
    """False: who asks gets no answer, since the router tells it."""


class ExportBook:
    """Exports and endings by key, links by number."""

    def __init__(self, max_endings: int) -> None:
        """Of endings, the latest `max_endings` are remembered."""
        self._max_endings = max_endings
        self.links: dict[int, ClaimLink] = {}
        self.exports: dict[Key, Export] = {}
        self.endings: OrderedDict[Key, Ending] = OrderedDict()

    def take_early_claim(self, key: Key) -> ClaimLink | None:
        """The link over which a key was claimed early; the claim is forgotten."""
        for link in self.links.values():
            if link.early_claims.pop(key, None) is not None:
                return link
        return None

    def end(
        self, export: Export, code: ErrorCode, message: str, *, told: bool = True
    ) -> list[ExportAction]:
        """End an export: nobody may read its blocks any more."""
        del self.exports[export.key]
        self.remember(export.key, code, message, told=told)
        return [FreeBlocks(export.key, tuple(export.blocks))] if export.blocks else []

    def remember(self, key: Key, code: ErrorCode, message: str, *, told: bool = True) -> None:
        """Keep in mind why there will be no hand-over of a key; see `Ending` for `told`."""
        self.endings[key] = Ending(code, message, told)
        while len(self.endings) > self._max_endings:
            self.endings.popitem(last=False)

    def revoke_early_claim(self, key: Key) -> list[ExportAction]:
        """Tell who claimed a key early that it has ended."""
        ending = self.endings[key]
        link = self.take_early_claim(key)
        if link is None:
            return []
        return [Send(link.number, Revoke(key, ending.code, ending.message))]
