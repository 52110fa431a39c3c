"""Prompts of our own for comparisons with the oracle: up to 930 tokens, several languages."""

Messages = list[dict[str, str]]

_TALE = (
    "The lighthouse keeper kept two logs. In the first she wrote what she saw: sails, gulls, "
    "weather, the slow green light of a buoy that had come loose in March. In the second she wrote "
    "what she expected to see on the morrow. On the last day of each month she laid the two "
    "side by side and counted the differences. "
)
_NOTES = (
    "Item {i}: the pump in hall {i} ran for {h} hours, was stopped for cleaning, restarted at a "
    "pressure of {p} bar; the operator noted a faint smell of oil near valve {v}. "
)


def _report(items: int) -> str:
    return "".join(
        _NOTES.format(i=i, h=(7 * i) % 23 + 1, p=(3 * i) % 11 + 2, v=(5 * i) % 17)
        for i in range(items)
    )


TEXTS: list[str] = [
    "A",
    "Water",
    "The sea",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time, in a village without clocks,",
    "Der Zug nach Norden fährt heute von Gleis",
    "La bibliothèque était fermée, alors nous avons",
    "El río nace en la montaña y",
    "def median(values):\n    ordered = sorted(values)\n",
    "東京は日本の",
    "Вода кипит при температуре",
    "Ingredients:\n- two eggs\n- a cup of flour\n-",
    _TALE,
    _TALE * 4 + "In April the difference was",
    _report(12) + "Summary:",
    _report(20) + "The most important item is",
]

CHATS: list[Messages] = [
    [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
    [{"role": "user", "content": "Nenne drei Flüsse in Europa."}],
    [{"role": "user", "content": "Écris une phrase sur la pluie."}],
    [
        {"role": "system", "content": "You answer in at most ten words."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "I have 3 apples and buy 4 more. How many are there?"},
        {"role": "assistant", "content": "You have 7 apples."},
        {"role": "user", "content": "I eat two. And now?"},
    ],
    [
        {"role": "user", "content": "Tell me about tides."},
        {"role": "assistant", "content": "Tides are the rise and fall of the sea."},
        {"role": "user", "content": "What causes them?"},
        {"role": "assistant", "content": "Mostly the Moon, and to a lesser part the Sun."},
        {"role": "user", "content": "When are they highest?"},
    ],
    [{"role": "user", "content": "Summarise this log:\n" + _report(8)}],
    [{"role": "user", "content": "Continue the story:\n" + _TALE * 3}],
]
