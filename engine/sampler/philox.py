"""Counter-based random numbers: a draw is a pure function of (seed, position).

So the token at a position does not depend on what else is in the batch, on which worker runs, or
on how many numbers were drawn before.

Source: Philox4x32-10, J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Four random 32-bit words from four words of counter and two of key."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left = _MULTIPLIERS[0] * a
        right = _MULTIPLIERS[1] * c
        a, b, c, d = (right >> 32) ^ b ^ k0, right & _MASK, (left >> 32) ^ d ^ k1, left & _MASK
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return a, b, c, d


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits.

    Args:
        seed: in [0, 2**64).
        position: in [0, 2**64).
    """
    high, low, _, _ = philox4x32(
        (position & _MASK, position >> 32, 0, 0), (seed & _MASK, seed >> 32)
    )
    return ((high >> 5) * 2.0**26 + (low >> 6)) * 2.0**-53
