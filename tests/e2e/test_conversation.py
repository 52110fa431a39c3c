"""Turns of a conversation find their KV by prefix alone: nothing has to be opened or closed."""

import random
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.cluster import Cluster

BLOCK = 16
FIRST, NEXT, ANSWER = 200, 20, 24


@dataclass
class Conversation:
    seed: int
    ids: list[int] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def say(self, system: Cluster) -> None:
        """Send everything so far and a new message; keep the answer."""
        rng = random.Random(f"{self.seed}/{len(self.turns)}")
        self.ids += [rng.randrange(3, 280) for _ in range(NEXT if self.turns else FIRST)]
        body = {
            "prompt": self.ids,
            "max_tokens": ANSWER,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = httpx.post(f"{system.url}/v1/completions", json=body, timeout=60).json()
        (choice,) = answer["choices"]
        line = system.get(f"/v1/requests/{answer['id']}/timeline").json()["sequences"][0]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.turns.append({"line": line, "cached": cached, "prompt": len(self.ids)})
        self.ids += choice["token_ids"]


def test_each_turn_computes_and_moves_only_what_the_last_one_left_out(plain: Cluster) -> None:
    talks = [Conversation(seed) for seed in range(4)]
    for _ in range(4):
        for talk in talks:
            talk.say(plain)
    block_bytes = plain.decode[0].describe().worker.layout.block_bytes
    for talk in talks:
        for before, turn in zip(talk.turns, talk.turns[1:], strict=False):
            assert turn["cached"] == before["prompt"] // BLOCK * BLOCK
            # The last token of an answer is never computed, so it has no KV.
            there = (before["prompt"] + ANSWER - 1) // BLOCK
            moved = turn["line"]["attempts"][0]["kv_bytes"] // block_bytes
            assert moved == -(-turn["prompt"] // BLOCK) - there
    plain.wait_balanced()


def test_the_last_turn_is_what_the_whole_conversation_gives_at_once(plain: Cluster) -> None:
    talk = Conversation(9)
    for _ in range(3):
        talk.say(plain)
    answered = talk.ids[-ANSWER:]
    for worker in plain.workers:
        worker.flush_cache()
    again = Conversation(9, ids=talk.ids[: -ANSWER - NEXT], turns=talk.turns[:-1])
    again.say(plain)
    assert again.turns[-1]["cached"] == 0
    assert again.ids[-ANSWER:] == answered
    plain.wait_balanced()
