"""A small English corpus out of nothing: a seeded grammar of children's stories.

For trying the whole path without a download. A story has somebody in a place, a wish or a trouble, a first try that
goes wrong, a friend, a turn and an end. `PLOTS` holds the beats of each kind of story; a beat is a choice of
sentences, `[a|b]` a choice inside one, `{slot}` a word of this story's cast, `a(n)` the article that fits the next
word, and a beat that begins with "?" is told half of the time. The idea of stories in a three-year-old's words is
that of TinyStories (Eldan and Li 2023).
"""

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

from creature.data.text.readers import MARKER
from creature.errors import UserError
from creature.files import replace_file


def _words(text: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split(",")]


GIRLS = _words(
    """Ada, Alma, Amy, Anna, Bella, Cara, Clara, Daisy, Dora, Ella, Elsa, Emma, Eva, Fay, Flora, Gwen, Hana, Hazel,
    Ida, Iris, Ivy, Jana, Jo, Kira, Lea, Lena, Lily, Lucy, Lulu, Maya, Mia, Mila, Nina, Nora, Olga, Pia,
    Polly, Rita, Rosa, Ruby, Sara, Sofia, Tara, Tess, Una, Vera, Wanda, Willa, Yara, Zoe"""
)
BOYS = _words(
    """Abel, Adam, Alan, Ali, Arlo, Ben, Carl, Dan, Eli, Emil, Felix, Finn, Fred, George, Gus, Hal, Henry, Hugo, Ian,
    Ike, Ivan, Jack, Jim, Jon, Kai, Karl, Leo, Levi, Luis, Max, Milo, Ned, Noah, Oliver, Omar, Oscar, Otto,
    Owen, Paul, Pete, Ravi, Rob, Sam, Theo, Tim, Tom, Toby, Victor, Will, Yusuf"""
)
ANIMAL_NAMES = _words(
    """Acorn, Bobbin, Bramble, Button, Clover, Cricket, Dash, Fern, Ginger, Hop, Inky, Jasper, Mossy, Nibbles,
    Nutmeg, Oakley, Patch, Pebble, Pepper, Pip, Poppy, Puddle, Rusty, Scout, Skip, Smoky, Snowy, Sorrel,
    Speckle, Sunny, Tansy, Teasel, Thistle, Tumble, Twig, Whisker, Willow, Zigzag"""
)
SPECIES = _words(
    """rabbit, fox, hedgehog, squirrel, mouse, otter, badger, duckling, owl, bear, beaver, frog, mole, deer, raccoon,
    turtle"""
)
SWIMMERS = _words("otter, duckling, beaver, frog, turtle")  # the story of learning to swim is not theirs
TRAITS = _words(
    """brave, busy, careful, cheerful, clever, curious, dreamy, eager, friendly, gentle, helpful, honest,
    imaginative, kind, little, lively, merry, patient, playful, polite, proud, quick, quiet, shy, silly,
    sleepy, small, stubborn, tidy, young"""
)
HOMES = _words(
    """a small village by the sea, a farmhouse at the edge of a forest, a tall house on a hill, a little house behind
    the market, a cottage near the river, an old mill with a mossy roof, a blue house with a round door, a town
    with many bridges, a lighthouse on a rocky island, an apartment above a bakery, a valley full of apple
    trees, a houseboat on a slow canal, a cabin high in the mountains, a house with a garden full of bees"""
)
DENS = _words(
    """a hollow tree, a cozy den under an oak, a nest of dry leaves, a warm burrow beside a brook, a hole under a
    mossy stone, a thicket at the edge of a meadow, an old log in the deep forest, a little house made of
    sticks, a cave behind a small waterfall, a bank full of primroses"""
)
PLACES = _words(
    """the meadow, the pond, the old stone bridge, the edge of the forest, the orchard, the windy hill, the big oak
    tree, the river, the berry bushes, the sandy path, the lake, the willow trees, the clearing"""
)
TOYS = _words(
    """ball, boat, kite, drum, whistle, lantern, scarf, basket, music box, wooden horse, umbrella, spinning top,
    puppet, toy train, paper crown, storybook, bell, hat, compass, bucket, blanket"""
)
LOOKS = _words(
    """red, blue, yellow, green, orange, purple, striped, spotted, shiny, tiny, old, new, silver, golden, bright,
    white, painted"""
)
FOODS = _words(
    """apple pie, blueberry muffins, honey cake, vegetable soup, warm bread, plum jam, oat cookies, pumpkin soup,
    pancakes, cherry tart, carrot cake, nut bread"""
)
SEEDS = _words("sunflower, pumpkin, bean, tomato, carrot, pea, melon, radish, strawberry")
SMALL = _words("bird, butterfly, kitten, ladybug, duckling, snail, bee, lamb, moth, lizard, sparrow, caterpillar")
WEATHER = [
    "The sun was [warm|bright|high] and [a light wind moved the grass|not one cloud was in the sky|the birds were "
    "singing].",
    "It was a gray day, and [soft rain fell on the leaves|mist lay over the fields|the air smelled of rain].",
    "The wind was [strong|wild|cold] that day, and [the clouds raced across the sky|leaves danced in the air|the "
    "branches creaked].",
    "Snow had fallen [in the night|since dawn|all week], and [everything was white and quiet|the world looked brand "
    "new].",
    "It was a [clear|cool|golden] autumn day, and the leaves were [red and brown|turning yellow|falling one by one].",
    "It had rained [all night|since the day before|for three days], and there were puddles everywhere.",
    "The morning was [fresh|misty|still], and drops of dew [shone on the grass|hung on every spider web].",
    "It was [a hot day|the hottest day of the summer], and even the [bees|flies|crickets] were too lazy to hum.",
]
ANY_WEATHER = {"lost", "share", "cook", "race"}  # the other plots bring their own

OPENINGS = [
    "[Once upon a time|Once|Long ago|Many years ago|In the days of our grandparents], there was a(n) {trait} {kind} "
    "named {H}. {He} lived in {home}.",
    "In {home} lived a(n) {trait} {kind} [named|called] {H}.",
    "{H} was a(n) {trait} {kind} who lived in {home}.",
    "[There was once|Once there lived] a(n) {trait} {kind} [whose name was|named|called] {H}, and {his} home was "
    "{home}.",
    "A(n) {trait} {kind} named {H} lived in {home} [with {his} family|with {his} two brothers|with {E}|not far from "
    "{place}].",
    "This is the story of {H}, a(n) {trait} {kind} [from|who came from|who grew up in] {home}.",
    "[Far away|Not far from here|Somewhere], in {home}, a(n) {trait} {kind} named {H} [opened {his} eyes|woke up|sat "
    "up and yawned]. It was [a special|a perfect|a busy|an ordinary] morning.",
    "Do you know {H}? {He} was a(n) {trait} {kind} who lived in {home}.",
    "Nobody was as {trait} as {H}. {He} was a(n) {kind}, and {his} home was {home}.",
]
HABITS = [
    "?Every [morning|day|afternoon], {he} [walked|ran|went|skipped] to {place} to [play|look around|say hello to the "
    "birds|listen to the water|count the clouds].",
    "?More than anything, {H} loved {food} and [long walks|rainy evenings|funny songs|good stories|sunny mornings].",
    "?{H} liked to [sing|whistle|hum|tell jokes|ask questions] all day long, and [nobody minded|it made everyone "
    "smile].",
    "?{He} was good at [climbing|finding things|telling stories|making soup|drawing], but not so good at "
    "[waiting|getting up early|sitting still|keeping secrets].",
    "?{H} had a collection of [smooth stones|feathers|buttons|shells|funny words], and [it grew every day|nobody was "
    "allowed to count it|it was the largest far and wide].",
]
FRIENDS = [
    "{His} best friend was {F}, a(n) {ftrait} {fkind} who lived [next door|nearby|across the water|down the path].",
    "{He} had a friend, a(n) {ftrait} {fkind} [called|named|by the name of] {F}.",
    "Next door lived {F}, a(n) {ftrait} {fkind}, and [the two were always together|they knew each other well|they "
    "often played together].",
    "{His} friend {F} was a(n) {ftrait} {fkind} [with a loud laugh|who was never in a hurry|with freckles on {fhis} "
    "nose|who knew every path].",
    "{H} and a(n) {ftrait} {fkind} named {F} [were friends|had been friends for a long time|did almost everything "
    "together].",
]
ENDINGS = [
    "From that day on, {H} and {F} [met at {place} every week|were the best of friends|always helped each other].",
    "That night, {H} fell asleep with a [smile|happy heart] and dreamed of [tomorrow|{place}|{food}|stars|the sea].",
    '"This was the best day [ever|of all|of my life]," said {H}, and {F} [agreed|nodded|thought so too].',
    "When the [sun went down|stars came out|moon rose|lamps were lit], they [walked|strolled|skipped] home together, "
    "[tired|muddy|hungry|sleepy] but [happy|glad|content].",
    "{H} [told {E} everything|told the whole story to {E}] at supper, and they ate {food} until [they were "
    "full|bedtime].",
    "And if you walk past {place} today, you may [still hear them laugh|see them there, side by side|hear {H} "
    "singing].",
    "{E} was [proud of {him}|proud of them both|very pleased], and everyone got some {food}.",
]
LESSONS = {
    "help": [
        "{H} had learned that [asking for help is not a weakness|two can do what one cannot|a friend makes hard "
        "things easy].",
        "{H} knew now that [it is good to ask|nobody has to do everything alone|help is often close by].",
    ],
    "brave": [
        "{H} had learned that being brave means [being afraid and trying anyway|taking one small step|going on].",
        "{H} was still a little afraid, but [now {he} knew what to do|that was all right|not as much as before].",
    ],
    "share": [
        "{H} had learned that [things are more fun when they are shared|a game is better with two|giving can feel "
        "like getting].",
        "{H} found that [sharing made {him} happy|there was enough for both|a friend is worth more than a toy].",
    ],
    "friend": [
        "{H} had learned that [a friend is worth more than any prize|a kind word can open every door|friends begin "
        "with one word].",
        "{H} knew now that [nothing is better than a friend|it is never too late to be kind|two laugh louder than "
        "one].",
    ],
    "patient": [
        "{H} had learned that [good things take time|waiting is a kind of work|some things cannot be hurried].",
        "{H} understood that [little by little is a fine way to go|slow is not the same as never|every day counts].",
    ],
    "honest": [
        "{H} had learned that [the truth is lighter to carry than a secret|saying sorry is hard, but it "
        "helps|everyone breaks something once].",
        "{H} felt as light as a feather, for [there was nothing to hide anymore|the truth was out|nobody was angry].",
    ],
}
SAD = (
    "[{H} felt very sad.|{H} did not know what to do.|A tear ran down {his} cheek.|{His} heart grew heavy.|{He} sat "
    "down and sighed.]"
)
MEET = [
    'Just then, {F} [came by|came along|walked past|peeked out from behind a bush]. "What is [wrong|the matter], '
    '{H}?" {fhe} asked.',
    '{F} heard {him} and came closer. "Why do you look so [sad|gloomy|worried]?" asked {F}.',
    'Soon {F} [arrived|turned up], [out of breath|eating a(n) apple|humming a tune]. "You look [worried|sad|lost]," '
    '{fhe} said. "[Can I help|May I help|What happened]?"',
]
PLOTS = {
    "lost": (
        "help",
        "One [day|morning|afternoon], {H} [wanted to play with|looked for|reached for] {his} {look} {toy}, but it was "
        "[gone|not there|nowhere to be found].",
        '"Where is my {toy}?" {he} [cried|asked|said]. "I had it [yesterday|this morning|last night]!"',
        "{He} looked [under the bed|behind the door|inside a big jar|in the tall grass] and [on the shelf|between the "
        "roots|under a pile of leaves|in every corner], but [found only dust|it was not there|there was only a(n) old "
        "button].",
        SAD,
        "<meet>",
        '"I lost my {look} {toy}," said {H}. "[Let us look together|Two see more than one|Think back]," said {F}. '
        '"Where did you [have it last|go yesterday|play last]?"',
        '{H} [thought hard|closed {his} eyes and thought|scratched {his} head]. "At {place}!" {he} said, and off they '
        "[ran|went|hurried].",
        "?On the way they asked a {small}, but the {small} [had seen nothing|only shook its head|was too busy to "
        "answer].",
        "[There|And there], [half hidden under a leaf|between two stones|hanging from a low branch|in the mud], was "
        "the {look} {toy}. [It was wet, but not broken.|A {small} was sitting on it.|It looked as if it had been "
        "waiting.]",
        '"[You found it|There it is|Hooray]!" {H} [shouted|cried|called], and [hugged {F}|jumped for joy|danced in a '
        "circle].",
    ),
    "stuck": (
        "help",
        "One [windy|bright|fine] [day|morning], {H} [took|carried] {his} {look} kite to {place}. [Up and up it "
        "flew|It flew higher than the trees].",
        "[Suddenly|Then|But all at once], the wind [turned|pulled hard|gave a jump], the string [slipped|broke], and "
        "the kite was [caught|stuck] in [the top of a tree|a high branch|the tallest pine].",
        "{H} [jumped|jumped as high as {he} could], but [the branch was too high|{he} could not reach it]. {He} "
        "[threw a stick|shook the tree|tried to climb], but [that did not help|nothing moved|only leaves came down].",
        SAD,
        "<meet>",
        '"My kite is up there, and I am too small," said {H}. "[You are small, and I am small|One alone is small]," '
        'said {F}, "but [together we are tall|one on top of the other we are not]."',
        "So {H} [stood|climbed] on {fhis} [back|shoulders] and [stretched|reached up]. [Almost!|A little more!|Not "
        "yet.] {F} [stood on the tips of {fhis} toes|held {fhis} breath|counted to three].",
        "[At last|Then], {H} [caught|grabbed] the string and pulled. Down came the {look} kite, and [both of them "
        "fell into the grass, laughing|with it came a rain of leaves].",
        "They [mended the tail|tied a new knot|straightened the sticks] and took turns [until the wind was tired|all "
        "afternoon].",
    ),
    "storm": (
        "brave",
        "{H} was not afraid of [spiders|deep water|the dark|tall trees], but {he} was afraid of one thing: "
        "[thunder|storms].",
        "One [evening|night], [dark clouds came over the hills|the sky turned black|the wind began to howl]. "
        "[Boom!|Crash!|Rumble!] {H} [hid under the blanket|put {his} hands over {his} ears|made {self} very small].",
        '"[I wish it would stop|Please go away]," {he} whispered, but the next one was [louder|even closer].',
        "Then {he} heard a(n) [tiny|thin|soft] voice [outside|at the door|under the window]. It was a little {small}, "
        "[wet and cold|shaking with fear|lost in the rain].",
        '"[It is more afraid than I am|It cannot stay out there]," thought {H}. {He} took a deep breath, [opened the '
        "door|lit the lantern|counted to ten], and [brought the {small} inside|carried it in].",
        '"[When you see the light|After the lightning], count with me," {H} told it. "[One, two, three|One, two]." '
        'Boom! "[You see|Listen], it is [moving away|only a noise|only the clouds bumping]."',
        "They counted [until there was no more thunder|all through the storm], and each time they could count "
        "[further|a little longer].",
        "In the morning, [the sky was clear|a rainbow stood over {place}|the world was washed clean]. {F} came by and "
        'asked, "[Were you afraid|Did you hear the storm]?"',
        '"[A little|Yes]," said {H}. "But [somebody needed me|I had no time for it|we were two]."',
    ),
    "share": (
        "share",
        "On {his} birthday, {H} got a(n) {look} {toy} from {E}. It was [the finest {toy} {he} had ever seen|just what "
        "{he} had wished for].",
        'When {F} saw it, {fhe} [clapped|smiled|stared]. "[May I hold it|Can I try it|Can we play with it together]?"',
        '"No!" said {H}. "It is mine." {F} [said nothing and went away|looked down and left|turned around and walked '
        "home].",
        "{H} played with the {toy} all [morning|by {self}|day long]. But after a while, [it was boring|it was not "
        "much fun|something was missing]. There was [nobody to laugh with|no one who said hello|no one to show it to].",
        '?{E} [sat down beside {him}|looked up from the {food}]. "[Why so quiet|All alone]?" {ehe} asked. "A(n) {toy} '
        'cannot laugh at your jokes, you know."',
        "{H} thought about that [for a long time|while the clouds went by]. Then {he} [ran|hurried] to {place}, where "
        "{F} was [throwing stones into the water|drawing in the sand|sitting on a log].",
        '"I am sorry," said {H}. "[It is more fun with you|I was not a good friend]. You can have the first turn."',
        "{F} [smiled from ear to ear|forgave {him} at once|was not angry anymore], and they [played until "
        "dark|invented a new game|laughed so much that their bellies hurt].",
    ),
    "garden": (
        "patient",
        'One [spring|fine|sunny] day, {E} gave {H} a single {seed} seed. "[Give it earth, water and time|Take good '
        'care of it|Be kind to it]," said {E}.',
        "{H} [dug a hole|made a little hole] with a [spoon|stick], put the seed in, and [covered it|patted the earth "
        "flat]. Then {he} [waited|sat down to watch].",
        'Nothing happened. [The next day|In the evening], nothing happened either. "[Perhaps it is asleep|It must be '
        'broken|It does not like me]," said {H}.',
        "?{He} [sang to it|told it a story|shouted at it|danced around it], but the earth stayed [brown|bare and "
        "brown|as it was].",
        'When {F} came to visit, {H} was about to dig it up. "[Stop|Wait|Do not do that]!" [cried|called] {F}. "[It '
        'is growing where you cannot see it|It needs its time|Seeds do not like to be watched]."',
        "So they watered it [every morning|each day] and [pulled out the weeds|kept the snails away|put a little "
        "fence around it].",
        "[After two weeks|One rainy morning|Ten days later], there was a [tiny|small] green [tip|point|leaf]. {H} "
        "[did not dare to breathe|called everyone|lay down on {his} belly to look].",
        "All summer, the {seed} plant grew until it was [as high as {his} knees|as tall as {F}|taller than the "
        "window], and [there was enough to share with everybody|everyone came to see it].",
    ),
    "broken": (
        "honest",
        "{E} had a(n) {look} [bowl|vase|cup|teapot] that stood [on the highest shelf|by the window|beside the clock]. "
        "Nobody was allowed to touch it.",
        "One rainy [day|afternoon], {H} was [chasing a {small}|playing with {his} {toy}|dancing through the room]. "
        "[Crash!|Clink!|Bang!] It lay on the floor in [three|four|five|a hundred] pieces.",
        '{H} [turned pale|held {his} breath]. {He} [swept|pushed] the pieces under the [rug|bed|leaves]. "[Nobody '
        'will know|Perhaps no one will see]," {he} whispered.',
        "But {his} [stomach hurt|heart beat fast], and at supper {he} could not eat {his} [soup|{food}].",
        '{H} told {F}, [and only {F}|because {he} had to tell someone]. "[What would you do|What shall I do]?" {he} '
        'asked. "[Say it|Tell {E}]," said {F}. "[It is hard for one minute|A secret only gets heavier]. I will come '
        'with you."',
        'So {H} went to {E}. "I broke it," {he} said [very quietly|in a small voice], "[and then I hid it|and I am '
        'sorry]."',
        '{E} [was silent for a moment|looked at {him} for a while]. "[It was only a thing|I liked it very much]," '
        '{ehe} said, "but I like [the truth|an honest {kind}] better. [Fetch the glue|Let us mend it]."',
        "They [glued|put] the pieces together, [one by one|all evening]. [You could see the cracks|It was not as "
        "pretty as before], but {E} said it was [more beautiful now|now a thing with a story].",
    ),
    "baby": (
        "help",
        "One [cool|sunny|misty] morning near {place}, {H} heard a [soft|sad|tiny] [cry|sound]. [Under a bush|In the "
        "grass|Behind a stone] sat a little {small}.",
        '"I cannot find my [mother|family|way home]," said the {small}. "[I only looked away once|I followed a(n) '
        '{look} leaf|I fell asleep], and then [they were gone|everything looked different]."',
        '"[Do not cry|Do not worry]," said {H}. "[I know this place well|I will help you]." They looked [behind every '
        "tree|along the water|up the hill], but [there was nobody|they found no one].",
        "?They called and called until {H} [had no voice left|was hoarse].",
        "Then {H} had a(n) idea. {He} went to {F}, [who knew everybody|who had the best ears of all|because two heads "
        'are better than one]. "[Can you see|Do you know] where this {small} belongs?"',
        '{F} [looked at it closely|thought for a moment]. "[Listen|Quiet]," {fhe} said. [From far away|From behind '
        "the hill], somebody was calling a name.",
        'The {small} [jumped up|began to shake with joy]. "[That is me|That is my name]!" it cried.',
        "They [ran|hurried] toward the voice, and [soon|a moment later] the little one was [back with its "
        'family|close to its mother]. "[Thank you|You are true friends]," said the mother, "[come and eat with us|you '
        'are always welcome here]."',
    ),
    "cook": (
        "help",
        "{H} wanted to make {food} for {E}, [who was ill|whose birthday it was|who had worked so hard all week].",
        "{He} [put on an apron|rolled up {his} sleeves], took the biggest [bowl|pot], and began to [stir|mix|pour]. "
        "But there was no [flour|salt|milk|butter|honey] in the house.",
        '"I will ask [the neighbors|around]," {he} said. At the first house, nobody was home. At the second, [a dog '
        "barked|they had none either|the door was locked].",
        SAD,
        'At the third house lived {F}. "[I have some|Here is a whole jar]," said {fhe}, "but I have [no spoon|nobody '
        'to cook with|no idea how to cook]."',
        '"Then [come with me|let us do it together]," said {H}. {F} [stirred|mixed] while {H} [read the recipe|kept '
        "the fire going|tasted it again and again].",
        "?Once it [boiled over|fell on the floor], and there was a [cloud of flour|big mess], and they [laughed and "
        "began again|cleaned it up together].",
        "When the {food} [was done|was ready], [the whole house smelled good|steam rose to the ceiling]. {E} took a "
        'bite and closed {ehis} eyes. "[I have never tasted anything better|I feel better already]," {ehe} said.',
    ),
    "race": (
        "friend",
        "Every year there was a race from {place} to {place2}, and this year {H} wanted to win. The prize was a(n) "
        "{look} {toy}.",
        "{He} trained [every day|for weeks|before breakfast]. {F} trained too, and [{fhe} was faster|nobody could say "
        "who was faster].",
        'On the day of the race, everyone [stood by the path and cheered|came to watch]. "[Ready, steady, go|On your '
        'marks, go]!" [called|shouted] {E}.',
        "{H} [ran like the wind|took the lead at once]. [Halfway|After the bridge|Near the end], {he} looked back. "
        "{F} [had fallen|was lying on the ground] and was holding {fhis} [leg|foot].",
        "{H} [slowed down|stopped]. The [finish|end] was so close! {He} could already see the {look} {toy} "
        "[shining|in the sun].",
        'But then {he} turned around. "[Does it hurt|Can you stand up]?" {he} asked. "[Go on|Run]," said {F}, "[or '
        'somebody else will win|you are almost there]."',
        '"[Not without you|We started together]," said {H}. {He} put an arm around {fhim}, and step by step they '
        "[walked|hobbled] to the end, [last of all|long after the others].",
        "Nobody had ever heard such cheering. [The winner gave them half of the prize|{E} gave them both a "
        "flower|They got no {toy}, but the loudest cheer].",
    ),
    "water": (
        "brave",
        "All {his} friends could swim, but {H} could not. When they [jumped into the water|played at {place}], {he} "
        "[sat on the bank|said that {he} was not hot|pretended to be busy].",
        '?"[Come in|Jump in|Try it], {H}!" they called. "[Later|Not today]," said {H}, and looked at {his} feet.',
        'One day, {F} sat down next to {him}. "[I was afraid too, once|It looks deeper than it is]," {fhe} said. '
        '"[Nobody has to know|We can go where it is shallow]."',
        "They went to a quiet place, and {H} put in one [toe|foot]. It was [cold|so cold]! {He} [jumped back|pulled "
        "it out].",
        '"[That was one|One is more than none]," said {F}. "[Tomorrow we try two|Now the other one]."',
        "Day after day they came back. First {he} stood in the water up to {his} knees, then up to {his} "
        "[belly|waist], and then {F} held {him} while {he} [kicked|paddled].",
        "One [warm|still] evening, {H} [paddled and paddled|kicked as hard as {he} could], and when {he} looked "
        "around, {F} was far behind. [Nobody was holding {him}!|{He} was swimming!]",
        '"[I let go long ago|You did that alone]," {F} [laughed|called]. {H} [swallowed some water|splashed in a '
        "circle] and [laughed too|could hardly believe it].",
    ),
    "sound": (
        "brave",
        "In the middle of the night, {H} woke up. There it was: [tap, tap, tap|scratch, scratch|a long, low "
        "creak|hoo, hoo]. [It came from outside|It came from above|It came from the dark corner].",
        '"Is it a [giant|ghost|dragon|monster]?" {he} thought, and pulled the blanket up to {his} [nose|eyes].',
        "{He} [tried to sleep|counted sheep|sang a song under {his} breath], but the sound [went on|grew louder|would "
        "not stop].",
        '{H} [tiptoed|crept] to {F} and woke {fhim}. "[Quiet|Listen|Wake up]!" {he} whispered. {F} [rubbed {fhis} '
        'eyes|sat up]. "[Let us go and see|There is only one way to find out]," {fhe} said.',
        "[Hand in hand|Side by side], with a(n) {look} lantern, they went [out into the dark|down the path|toward the "
        "sound]. Every shadow looked like [teeth|a face|a long arm].",
        '?"[You first|After you]," whispered {F}. "[Together|At the same time]," {H} whispered back.',
        "And then they saw it. It was [only a branch that knocked on the wall|only an old {toy} that swung in the "
        "wind|a small {small} that could not get out of a box].",
        'They looked at each other and [burst out laughing|began to giggle]. "[A fine dragon|What a terrible '
        'monster]!" said {H}, and [after that, they slept very well|they went back to bed|they never feared that '
        "sound again].",
    ),
    "new": (
        "friend",
        "One day, a(n) {ftrait} {fkind} named {F} [moved in nearby|came to live near {place}]. {F} knew nobody there.",
        "{H} saw {fhim} [sitting alone|playing alone|looking at the ground] at {place}. {H} wanted to say hello, but "
        "[{he} was too shy|the words would not come out].",
        "The next day, {F} was there again. {H} [hid behind a tree|walked past very slowly|dropped {his} {toy} on "
        "purpose], and [nothing happened|went home again].",
        '"[Say only one word|You need just one word]," said {E}. "[The second comes by itself|The rest comes alone]."',
        "On the third day, {H} took {his} {look} {toy} and some {food} and [walked right up to {F}|sat down next to "
        '{F}]. "[Hello|Hi]," {he} said.',
        '"[Hello|Hi]," said {F}. Then they were both silent. A {small} [flew past|sat down between them|made a funny '
        "noise], and they [both laughed at the same time|had to giggle].",
        '"[Are you hungry|Do you like {food}]?" asked {H}. "[Always|Very much]," said {F}, "and do you know how to '
        '[build a dam|climb that tree|skip stones]?"',
        "{H} did not, but {F} [showed {him}|knew how], and before they noticed, it was [evening|time to go home].",
    ),
}


class _Cast(dict):
    """The words of one story, drawn from the lists above."""

    def __init__(self, rng: random.Random):
        super().__init__()
        animals = rng.random() < 0.45
        names = rng.sample(ANIMAL_NAMES, 3) if animals else None
        kinds = rng.sample(SPECIES, 3) if animals else None
        for i, prefix in enumerate(("", "f", "e")):
            female = rng.random() < 0.5
            words = ("she", "her", "her", "herself") if female else ("he", "him", "his", "himself")
            self.update(zip((prefix + word for word in ("he", "him", "his", "self")), words, strict=True))
            kind = kinds[i] if animals else ("girl" if female else "boy")
            names_left = [name for name in (GIRLS if female else BOYS) if name not in self.values()]
            name = names[i] if animals else rng.choice(names_left)
            if prefix == "e":  # the elder: a relative, or an old animal
                titles = ("Grandma {}", "Aunt {}", "Mother") if female else ("Grandpa {}", "Uncle {}", "Father")
                self["E"] = f"old {name}" if animals else rng.choice(titles).format(name)
            else:
                self[prefix.upper() or "H"] = name
                self[prefix + "kind"] = kind
        self["trait"], self["ftrait"] = rng.sample(TRAITS, 2)
        self["place"], self["place2"] = rng.sample(PLACES, 2)
        self["home"] = rng.choice(DENS if animals else HOMES)
        lists = {"toy": TOYS, "look": LOOKS, "food": FOODS, "seed": SEEDS, "small": SMALL}
        self.update({slot: rng.choice(words) for slot, words in lists.items()})
        for slot in ("he", "his"):
            self[slot.capitalize()] = self[slot].capitalize()


_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (?=(hon|\w))")
_VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "hon")  # of the words above: an honest fox
_SENTENCE = re.compile(r"(^|[.!?] )([a-z])")


def _tell(rng: random.Random, text: str, cast: _Cast) -> str:
    """One beat with its choices made, its slots filled, its articles right and its sentences capitalized."""
    while "[" in text:
        text = _INNERMOST.sub(lambda match: rng.choice(match[1].split("|")), text)
    text = text.format_map(cast)
    text = _ARTICLE.sub(lambda match: match[1] + ("n " if match[2] in _VOWEL_SOUNDS else " "), text)
    return _SENTENCE.sub(lambda match: match[1] + match[2].upper(), text)


def _story(rng: random.Random) -> str:
    cast = _Cast(rng)
    plot = rng.choice([name for name in PLOTS if name != "water" or cast["kind"] not in SWIMMERS])
    lesson, *beats = PLOTS[plot]
    beats = [rng.choice(MEET) if beat == "<meet>" else beat for beat in beats]
    introduction = [rng.choice(OPENINGS), *rng.sample(HABITS, 2)]
    if plot != "new":  # the story of how they meet
        introduction.append(rng.choice(FRIENDS))
    if plot in ANY_WEATHER and rng.random() < 0.6:
        introduction.append(rng.choice(WEATHER))
    endings = [rng.choice(ENDINGS)]
    if rng.random() < 0.6:
        endings.insert(0, rng.choice(LESSONS[lesson]))
    paragraphs = []
    middle = rng.randrange(3, len(beats) - 2)
    for part in (introduction, beats[:middle], beats[middle:], endings):
        told = [_tell(rng, beat.removeprefix("?"), cast) for beat in part if beat[0] != "?" or rng.random() < 0.5]
        paragraphs.append(" ".join(told))
    return "\n\n".join(paragraphs)


def generate_stories(seed: int = 0) -> Iterator[str]:
    """Stories without end, the same for the same seed, none of them twice; each 100 to 400 words in paragraphs."""
    rng = random.Random(seed)
    told = set()
    while True:
        story = _story(rng)
        digest = hashlib.blake2b(story.encode("utf-8"), digest_size=8).digest()
        if digest not in told:
            told.add(digest)
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
                return counts
    raise AssertionError("the stories never end")
