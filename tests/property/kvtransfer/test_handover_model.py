"""Explores the two hand-over machines together; promises: tests/support/handover_world.py."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from core.errors import ErrorCode
from kvtransfer import actions as act
from kvtransfer import handover, handover_book
from kvtransfer.actions import ProbeOutcome
from kvtransfer.export import ExportMachine
from kvtransfer.handover import HandoverMachine
from kvtransfer.handover_book import HandoverBook
from kvtransfer.handover_record import Handover
from kvtransfer.messages import Key
from kvtransfer.peer_link import PeerLink
from kvtransfer.probing import ProbeSchedule
from tests.support.handover_explorer import explore, wander
from tests.support.handover_scenario import Scenario
from tests.support.handover_world import TTL, Violation

SCENARIOS = {
    "nothing goes wrong": Scenario(),
    "claim before submit": Scenario(late_submit=True),
    "decode aborts": Scenario(decode_aborts=True),
    "prefill fails": Scenario(prefill_fails=True),
    "link breaks": Scenario(link_breaks=True),
    "link breaks before submit": Scenario(link_breaks=True, late_submit=True),
    "reads fail": Scenario(reads_fail=True),
    "first block cached": Scenario(cached_blocks=1, decode_aborts=True, reads_fail=True),
    "all blocks cached": Scenario(cached_blocks=2, prefill_fails=True),
    "everything but time": Scenario(
        offered=True, decode_aborts=True, prefill_fails=True, link_breaks=True, reads_fail=True
    ),
    "lease runs out": Scenario(offered=True, last_time=1, time_step=TTL + 1),
    "lease runs out by a slow clock": Scenario(
        offered=True, last_time=1, time_step=TTL, decode_clock_rate=0.95
    ),
    "time passes, prefill fails": Scenario(
        offered=True, last_time=1, time_step=TTL - 2, prefill_fails=True
    ),
    "frozen peer": Scenario(
        offered=True, last_time=1, time_step=4, never_lands=True, decode_aborts=True
    ),
    "a probe, then a prompt": Scenario(probes=True, num_keys=2, last_time=1),
    "a probe of a full worker": Scenario(probes=True, num_keys=2, last_time=1, decode_is_full=True),
    "a probe whose link breaks": Scenario(probes=True, num_keys=1, last_time=1, link_breaks=True),
    "a probe of a frozen peer": Scenario(
        probes=True, num_keys=2, last_time=2, time_step=2, never_lands=True
    ),
    "a new link is tested": Scenario(proves=True, decode_aborts=True),
    "a new link is tested and breaks": Scenario(proves=True, link_breaks=True, reads_fail=True),
    "a new link brings other bytes": Scenario(
        proves=True, garbles=True, late_submit=True, decode_aborts=True
    ),
    "a new link of a full worker": Scenario(proves=True, decode_is_full=True, prefill_fails=True),
    "the first token is enough": Scenario(enough=True, late_submit=True),
    "the router withdraws": Scenario(withdraws=True, late_submit=True),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_interleaving_keeps_the_promises(name: str) -> None:
    assert explore(SCENARIOS[name]) > 100


def test_random_walks_with_every_misfortune_keep_the_promises() -> None:
    ends: Counter[str] = Counter()
    for seed in range(1500):
        scenario = Scenario(
            num_keys=2,
            last_time=8,
            time_step=1.5,
            decode_clock_rate=(0.95, 1, 1.05)[seed % 3],
            prefill_fails=seed % 2 == 0,
            decode_aborts=seed % 5 == 0,
            link_breaks=seed % 3 == 0,
            reads_fail=seed % 7 == 0,
            late_submit=seed % 2 == 1,
            cached_blocks=seed % 3,
            probes=seed % 4 == 0,
            decode_is_full=seed % 16 == 0,
            proves=seed % 3 == 1,
            garbles=seed % 9 == 1 and seed % 16 != 0,  # a full worker can't tell
            enough=seed % 4 == 1,
            withdraws=seed % 6 == 1,
        )
        world = wander(scenario, seed, 150)
        ends.update(world.ended.values())
        ends.update(world.probe_ends)
    assert min(ends["delivered"], ends["failed"]) > 200, ends
    assert min(ends[outcome] for outcome in ProbeOutcome) > 5, ends


# A checker that can't find a fault proves nothing: each rule is broken once.

Patch = Callable[[pytest.MonkeyPatch], None]


def skip_validity(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PeerLink, "holds_since", lambda *_: True)


def forget_that_a_lease_lapsed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PeerLink, "holds_since", lambda self, start, now: now < self.valid_until)
    patch.setattr(ExportMachine, "_expire", expire_silently)


def count_from_the_answer(patch: pytest.MonkeyPatch) -> None:
    honest = HandoverMachine._renewed

    def renewed(self: Any, link: PeerLink, seq: int, now: float) -> Any:
        actions = honest(self, link, seq, now)
        link.valid_until = now + link.ttl_s * (1 - link.drift_ratio)
        return actions + self._pump(link, now)

    patch.setattr(HandoverMachine, "_renewed", renewed)


def free_on_revoke(patch: pytest.MonkeyPatch) -> None:
    honest = ExportMachine.failed

    def failed(self: Any, key: Key, code: ErrorCode, message: str, now: float) -> Any:
        export = self._book.exports.get(key)
        actions = honest(self, key, code, message, now)
        return actions if export is None else [*actions, *end_once(self, export)]

    patch.setattr(ExportMachine, "failed", failed)


def free_on_link_close(patch: pytest.MonkeyPatch) -> None:
    honest = ExportMachine.link_closed

    def link_closed(self: Any, link: int, now: float) -> Any:
        exports = list(self._book.exports.values())
        actions = honest(self, link, now)
        return actions + [action for export in exports for action in end_once(self, export)]

    patch.setattr(ExportMachine, "link_closed", link_closed)


def end_once(machine: Any, export: Any) -> Any:
    if export.key not in machine._book.exports:
        return []
    return machine._book.end(export, ErrorCode.KV_TRANSFER, "mutated")


def expire_silently(self: Any, export: Any) -> Any:
    return self._book.end(export, ErrorCode.KV_TRANSFER, "mutated")


def no_revoke_on_expiry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ExportMachine, "_expire", expire_silently)


def drop_under_a_read(patch: pytest.MonkeyPatch) -> None:
    honest = HandoverBook.end

    def end(self: Any, key: Key, fail: Any, now: float) -> Any:
        record = self.handovers.get(key)
        actions = honest(self, key, fail, now)
        return [*actions, act.DropBlocks(key)] if record and record.read else actions

    patch.setattr(HandoverBook, "end", end)


def forget_to_release(patch: pytest.MonkeyPatch) -> None:
    for module in (handover, handover_book):
        patch.setattr(module, "Release", lambda key: handover.Renew(0))


def deliver_while_reading(patch: pytest.MonkeyPatch) -> None:
    honest = Handover.complete_at

    def complete_at(self: Any, now: float) -> bool:
        read, self.read = self.read, None
        complete = honest(self, now)
        self.read = read
        return complete

    patch.setattr(Handover, "complete_at", complete_at)


def deliver_without_commit(patch: pytest.MonkeyPatch) -> None:
    honest = HandoverMachine._progressed

    def progressed(self: Any, link: Any, progress: Any, now: float) -> Any:
        record = self._of_lease(link, progress.lease_id)
        if record is not None:
            record.next_block = record.num_blocks
        return honest(self, link, progress, now)

    patch.setattr(HandoverMachine, "_progressed", progressed)


def probe_beside_a_prompt(patch: pytest.MonkeyPatch) -> None:
    honest = ProbeSchedule.start

    def start(self: Any, link: PeerLink, now: float) -> Any:
        keys, link.keys = link.keys, {}
        probe = honest(self, link, now)
        link.keys = keys
        return probe

    patch.setattr(ProbeSchedule, "start", start)


def probe_ends_as_a_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(handover_book, "probe_ended", lambda key, fail: fail)


def read_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PeerLink, "proven", property(lambda link: True, lambda link, value: None))


def tell_decode_that_it_was_enough(patch: pytest.MonkeyPatch) -> None:
    def enough(self: Any, key: Key, now: float) -> Any:
        return self.failed(key, ErrorCode.KV_TRANSFER, "The first token ended it.", now)

    patch.setattr(ExportMachine, "enough", enough)


def keep_what_was_withdrawn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ExportMachine, "withdrawn", lambda self, key, router: [])


def end_a_claimed_lease_for_its_router(patch: pytest.MonkeyPatch) -> None:
    def withdrawn(self: Any, key: Key, router: int) -> Any:
        export = self._book.exports.get(key)
        return [] if export is None else end_once(self, export)

    patch.setattr(ExportMachine, "withdrawn", withdrawn)


MUTATIONS: dict[str, tuple[Patch, Scenario]] = {
    "skip the validity check": (skip_validity, SCENARIOS["lease runs out"]),
    "ignore drift": (
        lambda patch: None,
        Scenario(offered=True, last_time=1, time_step=TTL, decode_clock_rate=0.95, drift_ratio=0.0),
    ),
    "forget that a lease lapsed": (forget_that_a_lease_lapsed, SCENARIOS["lease runs out"]),
    "count validity from the answer": (
        count_from_the_answer,
        Scenario(last_time=1, time_step=TTL),
    ),
    "free on revoke": (free_on_revoke, SCENARIOS["prefill fails"]),
    "free on link close": (free_on_link_close, SCENARIOS["link breaks"]),
    "no revoke on expiry": (no_revoke_on_expiry, SCENARIOS["lease runs out"]),
    "drop blocks under a READ": (drop_under_a_read, SCENARIOS["decode aborts"]),
    "forget to release": (forget_to_release, SCENARIOS["nothing goes wrong"]),
    "deliver while reading": (deliver_while_reading, SCENARIOS["nothing goes wrong"]),
    "probe beside a prompt": (
        probe_beside_a_prompt,
        Scenario(probes=True, num_keys=2, last_time=2),
    ),
    "drop blocks under a probe's READ": (drop_under_a_read, SCENARIOS["a probe, then a prompt"]),
    "fail a request for a probe": (
        probe_ends_as_a_prompt,
        SCENARIOS["a probe whose link breaks"],
    ),
    "forget to release a probe": (forget_to_release, SCENARIOS["a probe, then a prompt"]),
    "read before the link is tested": (read_at_once, SCENARIOS["a new link is tested"]),
    "tell decode that it was enough": (
        tell_decode_that_it_was_enough,
        SCENARIOS["the first token is enough"],
    ),
    "keep what was withdrawn": (keep_what_was_withdrawn, SCENARIOS["the router withdraws"]),
    "end a claimed lease for its router": (
        end_a_claimed_lease_for_its_router,
        SCENARIOS["the router withdraws"],
    ),
    "deliver blocks never read": (deliver_without_commit, SCENARIOS["nothing goes wrong"]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_checker_finds_every_broken_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, scenario = MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises(Violation):
        explore(scenario)
