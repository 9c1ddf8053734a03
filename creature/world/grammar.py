"""What is said in the room: how visitors greet, ask and tell, and what the creature thinks and answers.

Training and validation share every word and no sentence frame: a way to ask is of one split only. After "the", a thing
is named by its shape ("cup") or by its color ("red one"); what it is not named by, only eyes can add.
"""

import numpy as np

ANIMALS = """cat dog horse cow pig sheep goat duck goose chicken fox wolf bear deer rabbit mouse rat frog snake
    turtle spider beetle bee fish shark whale seal owl eagle crow hawk dove pigeon puppy monkey lion tiger
    elephant camel lamb donkey squirrel kitten bull bat""".split()
PLACES = """garden forest river lake kitchen cellar attic street park field barn station harbor church school market
    castle bridge tower tunnel desert valley mountain beach island village city bakery library museum theater
    hospital office factory hotel airport swamp pond temple yard""".split()
FOODS = """bread soup rice pasta cheese cake pie salad beans potatoes carrots onions tomatoes apples pizza bacon
    stew bananas steak grapes mushrooms eggs butter honey jam pancakes noodles cookies peas corn cabbage
    pumpkin spinach chocolate pudding yogurt nuts toast""".split()
ITEMS = """lamp chair clock mirror carpet bucket hammer ladder rope candle umbrella basket bicycle piano guitar
    violin drum trumpet needle button spoon fork knife camera telephone radio map book pencil letter newspaper coat
    hat scarf shirt shoe ring watch blanket pillow bag suitcase""".split()
RELATIVES = "mother father brother sister uncle aunt cousin neighbor friend teacher grandmother grandfather".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
COUNTS = ("two", "three")
HANDS = {
    "high": (0.10, 0.25, 1.95),
    "front": (0.60, 0.22, 1.40),
    "side": (0.05, 0.80, 1.42),
    "chest": (0.30, 0.1, 1.28),
}

# How visitors speak, by split and kind; {what} names a thing, the rest is drawn in `script.py`.
SAY = {
    "train": {
        "greet": (
            "Hello, I am {name} and I have a {item}.",
            "Good morning, my name is {name} from the {place}.",
            "Hi there, this is {name} and I like {food}.",
            "I am {name} with the {animal}.",
        ),
        "touch": ("Touch the {what}, please.", "Could you touch the {what}?", "Put your hand on the {what}.",
                  "I want you to touch the {what} now.", "And now touch the {what}.",
                  "Please put a hand on the {what}.", "I want your hand on the {what} now."),
        "push": ("Push the {what}, please.", "Could you push the {what} away?", "Move the {what} a little.",
                 "I want you to push the {what} now.", "And now push the {what} a little.", "Please move the {what}.",
                 "I want you to move the {what} away."),
        "look": ("Look at the {what}, please.", "Could you look at the {what}?", "I want you to see the {what} now.",
                 "See the {what}, please.", "And now look at the {what}."),
        "color": ("What color is the {what}?", "Tell me the color of the {what}.", "Which color has the {what} now?",
                  "And the {what}, what color has it?", "Tell me which color the {what} has.",
                  "And what color is the {what} now?", "Tell me, which color is the {what}?"),
        "where": ("Where is the {what}?", "Tell me where you see the {what}.", "On which side is the {what} now?",
                  "And on which side is the {what}?", "Tell me where the {what} is.",
                  "And the {what}, which side is it on?", "And where is the {what} now?",
                  "Tell me on which side you see the {what}.", "And the {what}, on which side is it?"),
        "count": ("How many things are on the table?", "Tell me how many things you see.",
                  "And how many things are there on the table?", "On the table, how many things are there?",
                  "And now, how many things are on the table?"),
        "hand": ("Where is your {side} hand?", "Tell me where your {side} hand is.",
                 "And your {side} hand, where is it?", "Where is it now, your {side} hand?"),
        "who": ("What is my name?", "Tell me who I am.", "Who is speaking now?", "And what is my name?",
                "Tell me what my name is.", "And who is this?", "Tell me who is speaking."),
        "felt": ("What was {quality}?", "Tell me what was {quality}.", "Which thing was {quality} before?",
                 "And what was {quality} before?", "Tell me, what was {quality}?",
                 "And which thing was {quality}?", "Tell me what was {quality} before."),
        "saw": ("On {day} I saw a {animal} near the {place}.", "Last {season} there was a {animal} at the {place}.",
                "Near the {place} I saw a {animal} on {day}."),
        "cook": ("My {relative} made {food} on {day}.", "Last {season} my {relative} could only make {food}.",
                 "I like the {food} that my {relative} made."),
        "buy": ("On {day} my {relative} found a {item}.", "Last {season} I gave my {relative} a {item}.",
                "Now my {relative} has a {item}."),
        "saw?": ("Where was the {animal}?", "Tell me where the {animal} was.", "And where was the {animal}?",
                 "Tell me, where was the {animal}?"),
        "cook?": ("What did my {relative} make?", "Tell me what my {relative} made.",
                  "And what did my {relative} make?", "And what is it that my {relative} made?"),
        "buy?": ("What is it that my {relative} has now?", "Tell me which thing my {relative} has.",
                 "And what has my {relative} now?", "Tell me what it is that my {relative} has."),
    },
    "validation": {
        "greet": (
            "Hi, my name is {name} and I have a {animal}.",
            "Hello there, I am {name} with the {item}.",
            "Good morning, this is {name} from the {place} and I like {food}.",
        ),
        "touch": ("Please touch the {what} now.", "Could you put your hand on the {what}?"),
        "push": ("Please push the {what} a little.", "Could you move the {what} now?"),
        "look": ("Please look at the {what} now.", "Could you see the {what}?"),
        "color": ("Tell me what color the {what} has.", "And the {what}, which color is it?"),
        "where": ("Tell me on which side the {what} is.", "And the {what}, where is it?"),
        "count": ("And on the table, how many things?",),
        "hand": ("Tell me, where is your {side} hand now?",),
        "who": ("Tell me my name.", "Who am I?"),
        "felt": ("Tell me which thing was {quality}.", "And before, what was {quality}?"),
        "saw": ("Last {season} I saw a {animal} at the {place}.", "On {day} there was a {animal} near the {place}."),
        "cook": ("On {day} my {relative} made {food}.",),
        "buy": ("Last {season} my {relative} found a {item}.", "On {day} I gave my {relative} a {item}."),
        "saw?": ("And the {animal}, where was it?",),
        "cook?": ("Tell me, what did my {relative} make?",),
        "buy?": ("And my {relative}, which thing is it now?",),
    },
}  # fmt: skip
for _frames in SAY.values():
    _frames["meet"] = _frames["greet"]  # what the second visitor says
# What the creature thinks, a word a tick: first what was asked, then what another sense adds. Every word is one of
# GPT-2's tokens, and what was thought or heard before follows in the same order ("the red can left", then "touch the
# red can left"), so that it is found again by the word before it.
THINK = {
    "greet": "that is {name}",
    "meet": "that is {name} I see {table}",
    "touch": "touch {seen}",
    "push": "push {seen}",
    "look": "look at {seen}",
    "color": "the {what} is {answer}",
    "where": "find {seen}",
    "count": "I count {answer}",
    "hand": "I feel my {which} hand {answer}",
    "who": "I hear that this is {answer}",
    "change": "I see {table}",
    "felt": "I remember what was {quality} {answer}",
    "saw": "{name} saw the {animal} at the {place}",
    "cook": "{name} says the {relative} made {food}",
    "buy": "{name} says the {relative} has a {item}",
    "saw?": "I remember the {animal} at the {answer}",
    "cook?": "I remember the {relative} made {answer}",
    "buy?": "I remember the {relative} has a {answer}",
}
SEEN = "the {color} {kind} {side}"  # of a thing on the table, or of one that was named by its color
NAMED = "the {kind} {side}"  # of one that was named by its shape
FEEL = {"touch": "it feels {heat} and {feel}", "push": "it feels {weight}"}
# What it says, one frame each: which of several it would take, nothing that it senses could tell.
ANSWER = {
    "greet": "Hello {name}.",
    "meet": "Good morning {name}.",
    "touch": "It is {heat} and {feel}.",
    "push": "It is {weight}.",
    "look": "There it is.",
    "color": "It is {answer}.",
    "where": "It is on the {answer}.",
    "count": "There are {answer}.",
    "hand": "My hand is {answer}.",
    "who": "You are {answer}.",
    "felt": "The {answer} was {quality}.",
    "nothing": "I felt nothing {quality}.",
    "saw?": "Near the {answer}.",
    "cook?": "It was {answer}.",
    "buy?": "It is a {answer}.",
}


def choose(draw: np.random.Generator, options) -> str:
    return str(options[int(draw.integers(len(options)))])


def frame_words(split: str) -> set[str]:
    """The words of the sentence frames of a split, lower case, without what is drawn into them."""
    frames = [frame for frames in SAY[split].values() for frame in frames]
    words = {word.strip(".,?!").lower() for frame in frames for word in frame.split()}
    return {word for word in words if "{" not in word}


def vocabulary() -> set[str]:
    """Every word that can be heard, thought or said, lower case."""
    from creature.world.scene import COLORS, FEELS, NAMES, SHAPES, SIDE_PLACES, TEMPERATURES, WEIGHTS

    frames = [*THINK.values(), SEEN, NAMED, *FEEL.values(), *ANSWER.values()]
    words = {word.strip(".,?!").lower() for frame in frames for word in frame.split() if "{" not in word}
    drawn = (ANIMALS, PLACES, FOODS, ITEMS, RELATIVES, DAYS, SEASONS, COUNTS, HANDS, COLORS, FEELS, NAMES, SHAPES)
    words |= {word.lower() for words in (*drawn, SIDE_PLACES, TEMPERATURES, WEIGHTS) for word in words}
    return words | frame_words("train") | frame_words("validation") | {"one"}
