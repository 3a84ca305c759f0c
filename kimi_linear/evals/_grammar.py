"""English made from word lists: haystacks and short texts where no file is given.

Every text is a function of a random.Random, the same on every machine.
"""

from random import Random

NAMES = """
Ada Ben Cora Dan Ella Finn Gus Hana Ivy Jack Kira Leo Mia Noah Olga Pip Rosa Sam Tess Uma
Vera Will Yuri Zoe Amos Beth Carl Dora Emil Faye Glen Hugo Ines Joel Kate Liam Maya Nina
Otto Paul Ruth Tom
""".split()
TOPICS = """
cat dog fox hen owl bear frog goat crow deer duck wolf hare mouse horse otter sheep snail
rabbit turtle donkey pigeon beetle badger
""".split()
THINGS = """
apple basket bell blanket boat book bottle box bread brush button candle carpet chair clock
coat coin comb cup door drum feather flag flute hammer hat kettle key kite ladder lamp leaf
letter map mirror needle nest net onion paper pencil pie pillow plate ribbon ring rope
saddle scarf shell shovel spoon stone table tent ticket towel vase wagon wheel whistle
window
""".split()
QUALITIES = """
angry brave bright busy calm clever cold curious dark dusty early empty fast fierce fine
gentle golden happy heavy honest hungry kind large lazy light lonely loud lucky merry narrow
neat noisy old pale patient plain polite proud purple quick quiet rare red round rusty sad
sharp shiny short shy silent silver simple slow small smooth soft sour strange strong sweet
tall thin tiny tired warm wet white wild wise wooden yellow young
""".split()
PLACES = """
barn beach bakery bridge cave church corner cottage farm field forest garden harbor hill
island kitchen lake library market meadow mill mountain museum orchard park pond river road
roof school shop square station street tower town valley village well yard
""".split()
DEEDS = [
    words.strip()
    for words in """
asked for, built, carried, chased, cleaned, counted, drew, dropped, filled, fixed, followed,
found, hid, held, kept, lifted, lost, mended, moved, opened, painted, picked, pulled,
pushed, rolled, saw, shared, showed, sold, touched, tried, wanted, washed, watched
""".split(",")
]
TIMES = [
    words.strip()
    for words in """
One day, One morning, Later, Then, Soon, After a while, That night, The next day,
In the evening, At noon, In spring, Last week, Every Sunday, Before lunch, When it rained,
On a cold day
""".split(",")
]
FEELINGS = "happy sad proud tired glad scared excited hungry calm brave lonely kind".split()
MANNERS = "slowly quickly gladly quietly sadly proudly kindly boldly calmly neatly".split()

SENTENCES = (
    "{when}, {name} {did} the {quality} {thing} in the {place}.",
    "{name} {did} a {thing}, and the {animal} {did2} it {how}.",
    "The {quality} {animal} {did} a {thing} near the {place}.",
    "Nobody in the {place} {did} the {thing} but {name}.",
    "{when}, {name} and {name2} {did} a {quality} {thing} behind the {place}.",
    "There was a {quality} {thing} in the {place}, and {name} {did} it.",
    '"Look at the {quality} {thing}!" said {name} {how}.',
    "The {place} was {quality} and {quality2}, so {name} {did} the {thing}.",
    "{name} {did} every {thing} that {name2} {did2} in the {place}.",
    '"Where is my {thing}?" asked {name}. "It is in the {quality} {place}," said {name2}.',
)
OPENINGS = {  # of a text of each form about a topic
    "poem": "O {quality} {topic}, so {quality2} and {feeling},",
    "riddle": "I am {quality} and {quality2}, near the {place} I stay.",
    "letter": "Dear {name}, I saw a {quality} {topic} today.",
    "story": "{name} once {did} a {quality} {topic}.",
    "email": "Hello {name}, about the {topic}: it is {quality}.",
    "song": "Sing of the {topic}, {quality} and {quality2},",
    "speech": "Friends, the {topic} is {quality}.",
    "joke": "Why was the {topic} so {quality}?",
    "tweet": "Just saw a {quality} {topic}!",
    "essay": "The {topic} is {quality}, as {name} wrote.",
    "note": "Note to {name}: the {topic} is {quality}.",
    "recipe": "Take a {quality} {topic} and a {thing}.",
}
SEQUELS = (  # what it did; the small model's training texts end so
    "It {did} the {thing} and stayed {quality} by the {place}.",
    "In the {place} it {did} a {thing}, and {name} was {feeling}.",
    "Nobody {did} the {quality} {thing} but {name}.",
    "The {thing} in the {place} is {quality}, and {name} {did} it.",
)
FORMS = tuple(OPENINGS)


def sentence(r: Random) -> str:
    """One sentence, or two that belong together."""
    return _fill(r, r.choice(SENTENCES))


def piece(r: Random, form: str, topic: str, n_sentences: int) -> str:
    """A text of a form about a topic: its opening and n_sentences more."""
    parts = [OPENINGS[form], r.choice(SEQUELS), *r.choices(SENTENCES, k=n_sentences - 1)]
    return " ".join(_fill(r, part, topic) for part in parts)


def _fill(r: Random, pattern: str, topic: str | None = None) -> str:
    pick = r.choice
    return pattern.format(
        when=pick(TIMES), name=pick(NAMES), name2=pick(NAMES), did=pick(DEEDS),
        did2=pick(DEEDS), quality=pick(QUALITIES), quality2=pick(QUALITIES), thing=pick(THINGS),
        place=pick(PLACES), animal=pick(TOPICS), feeling=pick(FEELINGS), how=pick(MANNERS),
        topic=topic,
    )  # fmt: skip
