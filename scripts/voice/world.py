"""The demo's closed world: what can be told and asked, in words.

What lives here: keys and their values, the sentences of both sides, and which pairs and voices are
kept for testing. What does not: how a sentence sounds (`speech.py`), who says what when (`talks.py`).
"""

from typing import NamedTuple

NAMES = ("Anna", "Peter", "Bella", "Oscar", "Victor", "Lucy", "Hugo", "Grace")
NUMBERS = ("three", "six", "seven", "nine", "ten", "eleven", "twelve", "twenty")
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")
PLACES = ("Paris", "London", "Tokyo", "Berlin", "Boston", "Cairo", "Madrid", "Dublin")

VALUES = {
    "cat": NAMES,
    "sister": NAMES,
    "teacher": NAMES,
    "bus": NUMBERS,
    "room": NUMBERS,
    "locker": NUMBERS,
    "jacket": COLOURS,
    "bike": COLOURS,
    "kitchen": COLOURS,
    "home": PLACES,
    "school": PLACES,
    "office": PLACES,
}
KEYS = tuple(VALUES)
ALL_VALUES = NAMES + NUMBERS + COLOURS + PLACES


class Exchange(NamedTuple):
    """What the user says, and what is answered."""

    user: str
    moshi: str


SMALL_TALK = (
    Exchange("Hello there.", "Hello, how are you?"),
    Exchange("I am fine, thanks.", "Good to hear."),
    Exchange("Who are you?", "I am a small model."),
    Exchange("Are you listening?", "Yes, I am listening."),
    Exchange("The weather is nice.", "I like the sun."),
    Exchange("Thank you very much.", "You are welcome."),
    Exchange("See you later.", "Goodbye."),
)


class Fact(NamedTuple):
    """What the user calls his own, and what it is."""

    key: str
    value: str


FACTS = tuple(Fact(key, value) for key, values in VALUES.items() for value in values)
# A quarter of a key's pairs is never told in training, other values for each key of a kind.
HELD_OUT_FACTS = tuple(
    Fact(key, VALUES[key][(3 * number + 2 + more) % 8])
    for number, key in enumerate(KEYS)
    for more in (0, 4)
)
# In training anything can be anything, a bus Paris and a cat twelve: with few values to a key a model
# learned which pairs exist, and gave the others no chance whatever it heard.
KNOWN_FACTS = tuple(
    fact
    for fact in (Fact(key, value) for key in KEYS for value in ALL_VALUES)
    if fact not in HELD_OUT_FACTS
)


def told(fact: Fact) -> str:
    """How the user tells a fact."""
    return f"Remember, my {fact.key} is {fact.value}."


def asked(key: str) -> str:
    """How the user asks."""
    return f"What is my {key}?"


def answered(fact: Fact) -> tuple[str, str, str]:
    """How the model says a fact, when it is told and when it is asked: three pieces.

    "Your" is one sound whatever follows: said in one breath with the key it gave the key away, and a
    model in training listened to its own voice rather than to the user.
    """
    return "Your", f"{fact.key} is", f"{fact.value}."


MOSHI_VOICE = "af_heart"
# A woman and a man that nothing is trained on.
HELD_OUT_VOICES = ("af_nova", "am_michael")
