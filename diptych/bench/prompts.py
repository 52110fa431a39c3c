"""Prompts of a wanted length, random and again the same for a seed.

Token ids where the endpoint takes them, so that lengths are exact; else common words, whose number
follows from what a few requests showed of the endpoint's tokenizer and chat template. Two requests
share no prefix unless they are meant to. Pure.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from diptych.bench.arrivals import Arrival
from diptych.planning.trace import BLOCK_SIZE

Piece = TypeVar("Piece", int, str)
_TEXT = """
about above across after again against air all along also always am among an and animal another
answer any are area around as ask at away back base be beauty because become been before began
behind best better between big bird black blue boat body book both bring brought build but by call
came can car care carry change children city class clear close cold come common complete could
country course cover cross cry cut dark day decide deep did differ direct do dog done door down
draw dry during each early earth ease east eat end enough even every example eye face fact fall
family far farm fast father feel feet few field figure fill final find fine fire first fish five
fly follow food foot for force form found four free friend from front full game gave get girl give
go gold good got govern great green ground group grow had half hand happen hard has have he head
hear heard heat help her here high him his hold home horse hot hour house how hundred idea if in
inch interest is island it just keep kind king knew know land language large last late laugh lay
lead learn leave left less let letter life light like line list listen little live long look lot
love low machine made main make man many map mark may me mean measure men might mile mind minute
miss money moon more morning most mother mountain move much music must my name near need never new
next night no north note nothing notice noun now number object of off often oh old on once one
only open or order other our out over own page paper part pass pattern people person picture piece
place plain plan plane plant play point port pose possible power press problem produce product
pull put question quick rain ran reach read ready real record red remember rest right river road
rock room round rule run said same saw say school science sea second see seem self sentence serve
set several shape she ship short should show side simple since sing size sleep slow small snow so
some song soon sound south space special spell stand star start state stay step still stood stop
story street strong study such sun sure surface table tail take talk teach tell ten test than that
the their them then there these they thing think this those thought thousand three through time to
together told too took top town travel tree true try turn two under unit until up us use usual
very voice vowel wait walk want war warm was watch water way we week weight well went were west
what wheel when where which while white who whole why will wind with wonder wood word work world
would write year yes yet you young your
"""
WORDS = tuple(_TEXT.split())
"""Common enough to be one token each, with the space before it, in most vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """How the prompts of one run are made."""

    seed: int
    ids: Sequence[int] = ()
    """Token ids to draw from; none: prompts are text."""
    tokens_per_word: float = 1.0
    frame_tokens: float = 0.0
    """Tokens of a prompt of text that come from no word of it, such as a chat template's."""
    shared_tokens: int = 0
    """With which every prompt begins."""

    def write(self, arrival: Arrival) -> str | list[int]:
        """The prompt of one request: text, or as many ids as it says tokens."""
        if self.ids:
            return self._draw(arrival, self.ids, arrival.prompt_tokens, 1.0)
        wanted = (arrival.prompt_tokens - self.frame_tokens) / self.tokens_per_word
        return " ".join(self._draw(arrival, WORDS, max(1, round(wanted)), self.tokens_per_word))

    def _draw(
        self, arrival: Arrival, pieces: Sequence[Piece], length: int, per_piece: float
    ) -> list[Piece]:
        shared = min(length, round(self.shared_tokens / per_piece))
        drawn = random.Random(f"{self.seed}/shared").choices(pieces, k=shared)
        for name in arrival.blocks:
            drawn += random.Random(name).choices(pieces, k=round(BLOCK_SIZE / per_piece))
        own = random.Random(f"{self.seed}/{arrival.number}/prompt")
        drawn += own.choices(pieces, k=max(0, length - len(drawn)))
        return drawn[:length]
