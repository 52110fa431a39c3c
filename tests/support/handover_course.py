"""How a world of two hand-over machines is brought to its beginning, and to a good end."""

from tests.support.handover_scenario import Scenario
from tests.support.handover_world import TTL, World


def prepared(scenario: Scenario) -> World:
    """The world after the part of the story that the scenario leaves out."""
    world = World(scenario)
    while scenario.offered and any((*world.to_prefill.values(), *world.to_decode.values())):
        for link in world.to_prefill:
            if world.to_prefill[link]:
                world.prefill_hears(link)
            elif world.to_decode[link]:
                world.decode_hears(link)
    while scenario.probes and settle(world):
        pass
    world.frozen = scenario.never_lands
    return world


def drain(world: World) -> None:
    """Let everything that must happen happen, and check that nothing is left."""
    for key in world.keys:
        if key not in world.prefilled and key not in world.computing:
            world.submit_prefill(key)
        if key not in world.asked:
            world.submit_decode(key)
    for _ in range(4 * TTL):
        while settle(world):
            pass
        world.advance()
        world.turn_decode()
        world.turn_prefill()
    for key in world.keys:
        done = key in world.ended or key in world.aborted
        world.require(done, f"{key} never ended")
        owed = key in world.claims and world.claims[key] not in world.lost
        world.require(not owed or key in world.released, f"{key} was never released")
    world.require(world.export.num_leases == 0, "a lease is left")
    world.require(not any(world.held.values()), "a hold is left")
    world.require(world.handover.num_handovers == 0, "a hand-over is left")
    world.require(not world.reserved and not world.waiting, "a reservation is left")
    world.require(not world.reads, "a READ is left")
    world.require(world.probing is None, "a probe is left")
    for key in world.claims.keys() - set(world.keys):
        owed = world.claims[key] not in world.lost
        world.require(not owed or key in world.released, "a probe was never released")


def settle(world: World) -> bool:
    """Let one thing happen that is on its way already; False if nothing is."""
    for name, event in list(world.events()):
        kind = name.split()[0]
        if kind in ("prefill", "decode") and name.split()[1] != "hears":
            continue
        if kind in ("break", "lose", "time") or (kind == "poll" and not _landed(world, name)):
            continue
        event(world)
        return True
    return False


def _landed(world: World, name: str) -> bool:
    return world.reads[int(name.split()[1])].landed
