"""
What happens in a visit, whoever lives it: who says what and when, when the light goes out, whose hand is led, and what
is then on the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from creature.world import grammar
from creature.world.grammar import choose
from creature.world.scene import COLORS, SHAPES, SIDE_PLACES, Setting, Thing, draw_things
from creature.world.speech import speak

# Kind of event: how often it comes, seconds from the end of what is said to the next event.
KINDS = {
    "touch": (8.0, 4.5),
    "push": (5.0, 5.0),
    "look": (3.0, 2.4),
    "color": (3.0, 2.1),
    "where": (4.0, 2.2),
    "count": (1.0, 2.0),
    "hand": (1.5, 2.7),
    "who": (1.0, 2.3),
    "change": (36.0, 1.6),
    "felt": (2.0, 2.6),
    "saw": (0.4, 1.4),
    "cook": (0.4, 1.4),
    "buy": (0.4, 1.4),
}
TOLD = {"saw": ("saw?", "place", grammar.PLACES), "cook": ("cook?", "food", grammar.FOODS),
        "buy": ("buy?", "item", grammar.ITEMS)}  # fmt: skip
GREET_SECONDS, RECALL_SECONDS = {"greet": 1.5, "meet": 3.0}, 2.5
CHANGE_SECONDS = 0.32  # of dark, in which nobody speaks
LED_SECONDS = 1.4  # from the light going out until the hand is where it will be asked for
QUALITIES = ("hot", "cold", "rough", "soft", "heavy")


@dataclass
class Request:
    """
    Something that a visitor said or did, and whether the creature did as it was asked.

    kind: of `KINDS`, "greet", "meet", or one that ends in "?" and asks for what was told before. begins, heard, until:
    seconds at which the sentence begins, is over, and the next event comes; of a change, the dark. name: who said it.
    text: what was said; nothing at a change. details: what the frames of `grammar.py` are filled with. things: those on
    the table, as they are once it is heard. thing: number of the one that it is about, or None. options: the words of
    which one is the answer; answer: that one, known from `heard` on. chance: how often one succeeds who picks a thing,
    or a word of the options, at random; None if nothing is asked. samples: how it sounds, until that is among the
    sounds of the visit.
    """

    kind: str
    begins: float
    heard: float
    until: float
    name: str
    text: str
    details: dict
    samples: np.ndarray | None
    words: list[tuple[str, float]]
    things: list[Thing]
    thing: int | None = None
    options: tuple[str, ...] = ()
    answer: str | None = None
    chance: float | None = None
    outcome: bool | None = field(default=None, repr=False)

    def succeeded(self) -> bool:
        """Whether what the creature touched, pushed or answered first, or looked at last, was the right one."""
        return bool(self.outcome)


def write_script(draw: np.random.Generator, setting: Setting, begin: float, end: float) -> list[Request]:
    """
    What is said in a visit, in order: both visitors say who they are, then events follow until the end.

    begin, end: seconds of life between which there is light. What would end later is not begun.
    """
    requests, time, told, pushed = [], begin + draw.uniform(0.3, 0.7), [], set()
    for visitor, (kind, seconds) in zip(setting.visitors, GREET_SECONDS.items(), strict=True):
        details = _details(draw, setting, kind) | {"name": visitor[0]}
        requests.append(_request(draw, setting, kind, time, visitor, details, seconds))
        time = requests[-1].until
    kinds, weights = list(KINDS), np.array([share for share, _ in KINDS.values()])
    while True:
        kind = str(draw.choice(kinds, p=weights / weights.sum()))
        if told and draw.random() < 0.6:
            kind, details, visitor = told.pop(0)
            request = _request(draw, setting, kind, time, visitor, details, RECALL_SECONDS)
        else:
            visitor = setting.visitors[int(draw.integers(2))]
            if kind == "change":
                setting, pushed = replace(setting, things=draw_things(draw)), set()
            details = _details(draw, setting, kind) | {"name": visitor[0]}
            if kind == "push" and details["thing"] in pushed:  # pushed twice, it would be out of reach
                kind = "touch"
            pushed |= {details["thing"]} if kind == "push" else set()
            lead = LED_SECONDS if kind == "hand" else 0.0
            request = _request(draw, setting, kind, time + lead, visitor, details, KINDS[kind][1])
            if kind in TOLD:
                asked, key, _ = TOLD[kind]
                told.append((asked, details | {"answer": details[key]}, visitor))
        if request.until > end:
            return requests
        requests.append(request)
        time = request.until + draw.uniform(0.0, 0.4)


def _details(draw: np.random.Generator, setting: Setting, kind: str) -> dict:
    """What a sentence of this kind is about."""
    number = int(draw.integers(len(setting.things)))
    thing, by_color = setting.things[number], draw.random() < 0.5 and kind != "color"
    words = {name: choose(draw, words) for name, words in (
        ("animal", grammar.ANIMALS), ("place", grammar.PLACES), ("food", grammar.FOODS), ("item", grammar.ITEMS),
        ("relative", grammar.RELATIVES), ("day", grammar.DAYS), ("season", grammar.SEASONS), ("quality", QUALITIES),
        ("which", ("left", "right")), ("where", list(grammar.HANDS)),
    )}  # fmt: skip
    table = sorted(setting.things, key=lambda one: -one.place[1])  # from the left to the right
    return words | {
        "thing": number, "what": f"{thing.color} one" if by_color else thing.kind,
        "seen": (grammar.SEEN if by_color else grammar.NAMED).format(**vars(thing)),
        "table": " ".join(grammar.SEEN.format(**vars(one)) for one in table),
    }  # fmt: skip


def _request(draw, setting: Setting, kind: str, time: float, visitor: tuple, details: dict, seconds: float) -> Request:
    if kind == "change":  # without a word
        text, samples, words, heard = "", np.zeros(0), [], time + CHANGE_SECONDS
    else:
        frame = choose(draw, grammar.SAY[setting.split][kind])
        text = frame.format(**details | ({"side": details["which"]} if kind == "hand" else {}))
        samples, words = speak(text, visitor[1])
        heard = time + len(samples) / 16_000
    request = Request(kind, time, heard, heard + seconds, visitor[0], text, details, samples * draw.uniform(0.35, 0.6),
                      [(word, time + start) for word, start in words], setting.things)  # fmt: skip
    if kind in ("touch", "push", "look", "color", "where"):
        request.thing = details["thing"]
    request.options, request.answer = _answers(setting, kind, details)
    if kind in ("touch", "push", "look"):
        request.chance = 1 / len(setting.things)
    elif request.options:
        request.chance = 1 / len(request.options)
    return request


def _answers(setting: Setting, kind: str, details: dict) -> tuple[tuple[str, ...], str | None]:
    """(the words of which one is the answer, the right one); what was felt is known only when it is asked."""
    if kind in ("color", "where"):
        thing = setting.things[details["thing"]]
        return (tuple(COLORS), thing.color) if kind == "color" else (tuple(SIDE_PLACES), thing.side)
    known = {
        "count": (grammar.COUNTS, grammar.COUNTS[len(setting.things) - 2]),
        "hand": (grammar.HANDS, details.get("where")),
        "who": ([name for name, _ in setting.visitors], details["name"]),
        "felt": ((*SHAPES, "nothing"), None),
    } | {asked: (words, details.get("answer")) for asked, _, words in TOLD.values()}
    options, answer = known.get(kind, ((), None))
    return tuple(options), answer


def remembered(felt: list[tuple[Thing, str]], quality: str) -> str:
    """The shape of the last thing that was felt to have a quality, or "nothing"; felt: (thing, what was done to it)."""
    tests: dict[str, Callable] = {
        "hot": lambda thing, kind: thing.heat == "hot",
        "cold": lambda thing, kind: thing.heat == "cold",
        "rough": lambda thing, kind: thing.feel == "rough",
        "soft": lambda thing, kind: thing.feel == "soft",
        "heavy": lambda thing, kind: thing.weight == "heavy" and kind == "push",
    }
    found = [thing.kind for thing, kind in felt if tests[quality](thing, kind)]
    return found[-1] if found else "nothing"
