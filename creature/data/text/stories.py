"""A small English corpus out of nothing: children's stories from a seeded grammar.

To try the whole path without a download. A story is an opening, the beats of a plot and an ending. In each, `[a|b]` is
a choice, `{slot}` a word of this story's cast, and `a(n)` the article that fits the next word; a beat that begins with
"?" is left out half of the time. Stories in a three-year-old's words are the idea of TinyStories (Eldan and Li 2023).
"""

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

from creature.data.text.readers import MARKER
from creature.errors import UserError
from creature.files import replace_file

GIRLS = "Ada Anna Bella Clara Daisy Ella Eva Flora Hazel Ivy Lena Lily Maya Mia Nora Rosa Ruby Sofia Tess Zoe".split()
BOYS = "Adam Ali Ben Carl Eli Finn Gus Hugo Ivan Jack Kai Leo Max Milo Noah Omar Oscar Sam Theo Tim".split()
GRAMMAR = """\
words
- animal: rabbit, fox, hedgehog, squirrel, mouse, otter, badger, owl, bear, beaver, frog, mole, deer, raccoon
- trait: brave, busy, careful, cheerful, clever, curious, eager, friendly, gentle, honest, kind, little, merry,
  patient, playful, proud, quiet, shy, silly, small, stubborn, tidy, young
- home: a small village by the sea, a farmhouse at the edge of a forest, a tall house on a hill, a cottage near the
  river, an old mill with a mossy roof, a town with many bridges, a valley full of apple trees, a warm den under an
  oak, a hollow tree, a little house made of sticks, a cave behind a small waterfall, a thicket at the edge of a
  meadow
- place: the meadow, the pond, the old stone bridge, the edge of the forest, the orchard, the windy hill, the big oak
  tree, the river, the berry bushes, the sandy path, the lake, the willow trees
- toy: ball, boat, drum, whistle, lantern, scarf, basket, music box, umbrella, spinning top, toy train, bell, hat,
  bucket
- look: red, blue, yellow, green, orange, purple, striped, spotted, shiny, tiny, old, new, silver, golden, white
- food: apple pie, blueberry muffins, honey cake, vegetable soup, warm bread, plum jam, oat cookies, pumpkin soup,
  pancakes, cherry tart, carrot cake, nut bread
- seed: sunflower, pumpkin, bean, tomato, carrot, pea, melon, radish, strawberry
- creature: bird, butterfly, kitten, ladybug, duckling, snail, bee, lamb, moth, lizard, sparrow, caterpillar
- elder: {his} grandmother, {his} mother, {his} aunt, the old woman next door

openings
- [Once upon a time|Once|Long ago|Many years ago], there was a(n) {trait} {kind} named {H}. {He} lived in {home}.
- In {home} lived a(n) {trait} {kind} [named|called] {H}.
- {H} was a(n) {trait} {kind} [who lived in|from|who grew up in] {home}.
- This is the story of {H}, a(n) {trait} {kind} from {home}.
- Do you know {H}? {He} was a(n) {trait} {kind} who lived in {home}.
- Nobody was as {trait} as {H}. {He} was a(n) {kind}, and {his} home was {home}.

habits
- ?Every [morning|day|afternoon], {he} [walked|ran|went] to {place} to [play|look around|count the clouds].
- ?More than anything, {H} loved {food} and [long walks|rainy evenings|funny songs|good stories|sunny mornings].
- ?{He} was good at [climbing|finding things|telling jokes|drawing], but not so good at [waiting|sitting still].
- ?It was a [warm|clear|windy|gray|misty] day, and [the birds were singing|the leaves danced|the grass was wet].

friends
- {His} best friend was {F}, a(n) {ftrait} {fkind} who lived [next door|nearby|across the water].
- {He} had a friend, a(n) {ftrait} {fkind} [called|named] {F}, [with a loud laugh|who was never in a hurry].
- Next door lived {F}, a(n) {ftrait} {fkind}, and the two [were always together|knew each other well].

endings
- From that day on, {H} and {F} [met at {place} every week|were the best of friends|always helped each other].
- That night, {H} fell asleep with a [smile|happy heart] and dreamed of [tomorrow|{place}|{food}|stars|the sea].
- "This was the best day [ever|of all|of my life]," said {H}, and {F} [agreed|nodded|thought so too].
- When the [sun went down|stars came out], they walked home together, [tired|muddy|hungry] but [happy|glad].
- {H} told {elder} [everything|the whole story] at supper, and they ate {food} until [they were full|bedtime].

plot of lost
- One [day|morning], {H} [wanted to play with|looked for] {his} {look} {toy}, but it was [gone|not there].
- "Where is my {toy}?" {he} [cried|asked]. "I had it [yesterday|this morning|last night]!"
- {He} looked [under the bed|behind the door|in the tall grass] and [on the shelf|under a pile of leaves], but
  [found only dust|it was not there|there was only a(n) old button].
- [{H} felt very sad.|A tear ran down {his} cheek.|{He} sat down and sighed.] [Just then|Soon], {F} [came along|walked
  past|peeked out from behind a bush]. "[What is wrong|Why do you look so sad], {H}?" {fhe} asked.
- "I lost my {look} {toy}," said {H}. "[Let us look together|Think back]," said {F}. "Where did you have it last?"
- {H} [thought hard|closed {his} eyes and thought]. "At {place}!" {he} said, and off they [ran|went|hurried].
- ?On the way they asked a {creature}, but the {creature} [had seen nothing|only shook its head].
- There, [half hidden under a leaf|between two stones|in the mud], was the {look} {toy}. [It was wet, but not
  broken.|A {creature} was sitting on it.]
- {H} had learned that [two see more than one|it is good to ask for help].

plot of storm
- {H} was not afraid of [spiders|deep water|the dark], but {he} was afraid of [thunder|storms].
- One [evening|night], [dark clouds came over the hills|the wind began to howl]. [Boom!|Crash!] {H} [hid under the
  blanket|put {his} hands over {his} ears].
- Then {he} heard a [tiny|thin|soft] voice [outside|at the door|under the window]. It was a little {creature}, [wet
  and cold|shaking with fear|lost in the rain].
- "[It is more afraid than I am|It cannot stay out there]," thought {H}. {He} took a deep breath, [opened the
  door|lit the lantern], and carried the {creature} inside.
- "After the lightning, count with me," {H} told it. "[One, two, three|One, two]." Boom! "[You see|Listen], it is
  [moving away|only a noise|only the clouds bumping]."
- ?They counted [until there was no more thunder|all through the storm].
- In the morning, the sky was clear. {F} came by and asked, "[Were you afraid|Did you hear the storm]?"
- "[A little|Yes]," said {H}. "But [somebody needed me|we were two]."

plot of share
- On {his} birthday, {H} got a(n) {look} {toy} from {elder}. It was [just what {he} had wished for|the finest {toy}
  {he} had ever seen].
- When {F} saw it, {fhe} [clapped|smiled|stared]. "[May I hold it|Can I try it|Can we play with it together]?"
- "No!" said {H}. "It is mine." {F} [said nothing and went away|looked down and left].
- {H} played with the {toy} all [morning|day long]. But after a while, [it was boring|something was missing].
- ?There was [nobody to laugh with|no one to show it to].
- {H} thought about that [for a long time|while the clouds went by]. Then {he} hurried to {place}, where {F} was
  [throwing stones into the water|drawing in the sand|sitting on a log].
- "I am sorry," said {H}. "[It is more fun with you|I was not a good friend]. You can have the first turn."
- {F} [smiled from ear to ear|was not angry anymore], and they [played until dark|invented a new game].
- {H} found that [things are more fun when they are shared|a friend is worth more than a toy].

plot of garden
- One [spring|fine|sunny] day, {elder} gave {H} a single {seed} seed. "[Give it earth, water and time|Take good care
  of it]," she said.
- {H} dug a hole with a [spoon|stick], put the seed in, and [covered it|patted the earth flat]. Then {he}
  [waited|sat down to watch].
- Nothing happened. The next day, nothing happened either. "[Perhaps it is asleep|It does not like me]," said {H}.
- ?{He} [sang to it|told it a story|danced around it], but the earth stayed brown.
- When {F} came to visit, {H} was about to dig it up. "[Stop|Wait]!" called {F}. "[It is growing where you cannot
  see it|It needs its time]."
- So they watered it [every morning|each day] and [pulled out the weeds|kept the snails away].
- [After two weeks|One rainy morning], there was a [tiny|small] green [tip|leaf]. {H} [did not dare to
  breathe|called everyone].
- All summer, the {seed} plant grew until it was [as tall as {F}|taller than the window].
- {H} had learned that [good things take time|waiting is a kind of work].

plot of new
- One day, a(n) {ftrait} {fkind} named {F} came to live near {place}. {F} knew nobody there.
- {H} saw {fhim} [sitting|playing] alone. {H} wanted to say hello, but [{he} was too shy|the words would not come
  out].
- The next day, {F} was there again. {H} [hid behind a tree|walked past very slowly] and went home.
- "[Say only one word|You need just one word]," said {elder}. "The second comes by itself."
- On the third day, {H} took {his} {look} {toy} and some {food} and [walked right up to|sat down next to] {F}.
  "[Hello|Hi]," {he} said.
- "[Hello|Hi]," said {F}. Then they were both silent. A {creature} [came past|made a funny noise], and they both had
  to laugh.
- "[Are you hungry|Do you like {food}]?" asked {H}. "[Always|Very much]," said {F}, "and do you know how to [build a
  dam|climb that tree|skip stones]?"
- {H} did not, but {F} [showed {him}|knew how], and before they noticed, it was [evening|time to go home].
"""


def _parse(grammar: str) -> dict[str, list[str]]:
    """The entries of each section: a heading, then lines that begin with "- ", perhaps continued on the next."""
    sections = (section.split("\n- ") for section in grammar.strip().split("\n\n"))
    return {heading: [" ".join(entry.split()) for entry in entries] for heading, *entries in sections}


SECTIONS = _parse(GRAMMAR)
WORDS = {slot: words.split(", ") for slot, words in (entry.split(": ") for entry in SECTIONS["words"])}
PLOTS = [beats for heading, beats in SECTIONS.items() if heading.startswith("plot")]


def _cast(rng: random.Random) -> dict[str, str]:
    """The words of one story by their slots: a hero H and a friend F, both animals or both children."""
    cast = {slot: rng.choice(words) for slot, words in WORDS.items()}
    cast["trait"], cast["ftrait"] = rng.sample(WORDS["trait"], 2)
    animals = rng.sample(WORDS["animal"], 2) if rng.random() < 0.5 else None
    for i, (prefix, name) in enumerate((("", "H"), ("f", "F"))):
        female = rng.random() < 0.5
        he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
        cast |= {prefix + "he": he, prefix + "him": him, prefix + "his": his}
        cast[prefix + "kind"] = animals[i] if animals else "girl" if female else "boy"
        cast[name] = rng.choice([one for one in (GIRLS if female else BOYS) if one != cast.get("H")])
    cast["elder"] = cast["elder"].format_map(cast)
    return cast | {"He": cast["he"].capitalize(), "His": cast["his"].capitalize()}


def _write(rng: random.Random, beat: str, cast: dict[str, str]) -> str:
    """One beat with its choices made, its slots filled, its articles right and its sentences capitalized."""
    while "[" in beat:
        beat = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), beat)
    text = beat.removeprefix("?").format_map(cast)
    text = re.sub(r"\b([Aa])\(n\) (?=([aeiou]|hon)?)", lambda match: match[1] + ("n " if match[2] else " "), text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _story(rng: random.Random) -> str:
    cast, plot = _cast(rng), rng.choice(PLOTS)
    opening = [rng.choice(SECTIONS["openings"]), *rng.sample(SECTIONS["habits"], 2)]
    if "{ftrait}" not in plot[0]:  # a plot that introduces the friend itself
        opening.append(rng.choice(SECTIONS["friends"]))
    middle = rng.randrange(2, len(plot) - 2)
    parts = [opening, plot[:middle], plot[middle:], [rng.choice(SECTIONS["endings"])]]
    kept = [[beat for beat in part if beat[0] != "?" or rng.random() < 0.5] for part in parts]
    return "\n\n".join(" ".join(_write(rng, beat, cast) for beat in part) for part in kept)


def generate_stories(seed: int = 0) -> Iterator[str]:
    """Stories without end, the same for the same seed, none of them twice; each of 80 to 300 words in paragraphs."""
    rng, digests = random.Random(seed), set()
    while True:
        story = _story(rng)
        digest = hashlib.blake2b(story.encode("utf-8"), digest_size=8).digest()
        if digest not in digests:
            digests.add(digest)
            yield story


def write_story_corpus(path: str | Path, tokens: int = 300_000, seed: int = 0) -> dict:
    """
    Write stories of at least `tokens` GPT-2 tokens to `path`, with <|endoftext|> lines between them.

    The end-of-text token after each story counts. Returns the numbers: stories, characters, tokens.
    """
    from creature.data.text.tokenizer import load_encoding

    if tokens < 1:
        raise UserError(f"--tokens {tokens} is less than 1: 300000 is enough for a dry run")
    encoding = load_encoding()
    counts = {"stories": 0, "characters": 0, "tokens": 0}
    with replace_file(path, "w") as file:
        for story in generate_stories(seed):
            file.write(f"{story}\n{MARKER}\n")
            counts["stories"] += 1
            counts["characters"] += len(story)
            counts["tokens"] += len(encoding.encode_ordinary(story)) + 1
            if counts["tokens"] >= tokens:
                break
    return counts
