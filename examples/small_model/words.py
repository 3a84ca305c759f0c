"""Our own word lists and a small grammar of English: stories, letters, notes, filler."""

NAMES = """Ada Ben Cora Dan Ella Finn Gus Hana Ivy Jack Kira Leo Mia Noah Olga Pip Quinn Rosa Sam Tess
Uma Vera Will Xena Yuri Zoe Amos Beth Carl Dora Emil Faye Glen Hugo Ines Joel Kate Liam Maya Nina Otto
Paul Ruth Sara Tom Una Vic Wanda Zack Lily Max Anna""".split()
ANIMALS = """cat dog fox hen owl bear frog goat crow deer duck wolf hare mouse horse otter sheep snail
rabbit turtle donkey pigeon beetle badger""".split()
THINGS = """apple bag ball bell boat book box bread brush cake cap chair clock coat cup door drum egg fan
flag flute gate glove hat jar key kite lamp leaf map mirror nail nest net pan pear pen pie plate pot ring
rope scarf seed shell shoe spoon stick stone string table tent ticket top towel toy vase wagon wheel
whistle window basket blanket bottle bucket button candle carpet carrot coin comb cushion feather hammer
kettle ladder letter marble needle onion paint paper pencil pillow ribbon saddle shovel sponge statue
umbrella violin wallet anchor arrow barrel bench bridge cabin castle chain cloud crystal diamond dragon
engine forest fountain garden ghost giant harbor hill island jewel jungle king lantern lemon meadow
melon monster moon mountain ocean palace parrot pearl piano pirate planet pocket prince puzzle queen
river robot rocket sailor shadow silver spider spring star storm summer sword temple thunder tiger
tower train treasure tunnel valley village volcano water wizard winter""".split()
ADJECTIVES = """angry big black blue bold brave bright brown busy calm clean clever cold cool cosy curious
dark deep dry dusty eager early empty fair fast fat fierce fine flat fond free fresh friendly funny gentle
glad golden good grand great green grey happy hard heavy high honest hot huge humble hungry jolly keen kind
large late lazy light little lone long loud lucky merry mild modern narrow neat new nice noisy odd old open
pale patient plain pink polite poor proud purple quick quiet rare red rich ripe rough round royal rusty sad
safe salty sharp shiny short shy silent silly simple slim slow small smart smooth soft sour spare steep still
strange strong sunny sweet swift tall tame tender thick thin tidy tiny tired tough vast warm weak wet white
wide wild wise wooden yellow young""".split()
PLACES = """barn beach bakery bridge cave church corner cottage farm field forest garden harbor hill house
island kitchen lake library market meadow mill mountain museum orchard park pond river road roof school
shop square station street tower town tree valley village well wood yard zoo""".split()
VERBS = """asked built carried chased cleaned climbed cooked counted danced drew dropped dug fed filled fixed
followed found hid held hugged kept kicked lifted liked lost loved mended moved opened painted picked pulled
pushed read rolled saw sang shared showed sold splashed stopped threw touched tried used wanted washed
watched waved wrote""".split()
FEELINGS = "happy sad proud tired glad scared excited hungry calm brave lonely cheerful sleepy kind".split()
TIMES = """One day|One morning|Later|Then|Soon|After a while|That night|The next day|In the evening|At noon|
In spring|Last week|Every Sunday|Before lunch|When it rained|On a cold day""".replace("\n", "").split("|")
FORMATS = "poem riddle letter story email song speech joke tweet essay note recipe".split()

FILLER = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
]


def sentence(r):
    """One sentence of plain English about somebody doing something somewhere."""
    n, m = r.choice(NAMES), r.choice(NAMES)
    t, u = r.choice(THINGS), r.choice(THINGS)
    a, b = r.choice(ADJECTIVES), r.choice(ADJECTIVES)
    p, v, w = r.choice(PLACES), r.choice(VERBS), r.choice(VERBS)
    x, f, when = r.choice(ANIMALS), r.choice(FEELINGS), r.choice(TIMES)
    return r.choice((
        f"{n} {v} the {a} {t}.",
        f"{when}, {n} went to the {p} with a {a} {x}.",
        f"The {x} was {f}, so {n} {v} it and gave it a {t}.",
        f"{n} and {m} {v} the {t} near the {p}.",
        f"There was a {a} {t} in the {p}, and nobody knew why.",
        f"\"Look at the {a} {t}!\" said {n}.",
        f"{when}, the {a} {x} {v} a {t} by the {b} {p}.",
        f"{n} felt {f} because the {t} was {a}.",
        f"\"Where is my {t}?\" asked {m}. \"It is in the {p},\" said {n}.",
        f"{m} {v} a {a} {t}, and then {w} the {b} {u}.",
        f"The {p} was {a} and {b}, but {n} was not {f}.",
        f"{when}, {n} told {m} a story about a {a} {x} and a {b} {t}.",
    ))


def story(r):
    """A short story with one hero, one wish and an ending."""
    n, m, x = r.choice(NAMES), r.choice(NAMES), r.choice(ANIMALS)
    t, p, a, b = r.choice(THINGS), r.choice(PLACES), r.choice(ADJECTIVES), r.choice(ADJECTIVES)
    f, q = r.choice(FEELINGS), r.choice(PLACES)
    out = [r.choice((
        f"Once upon a time, there was a {a} {x} named {n}.",
        f"Once upon a time, a {a} {x} called {n} lived near a {p}.",
        f"{n} was a {a} {x} who lived in a {b} {p}.",
        f"There once was a {x} named {n}. {n} was very {a}.",
    ))]
    out.append(r.choice((
        f"{n} loved to play with a {t}.",
        f"{n} had a {b} {t} and took it everywhere.",
        f"Every day {n} went to the {q} to look for a {t}.",
        f"{n} wanted a {b} {t} more than anything.",
    )))
    out.append(r.choice((
        f"One day, the {t} was gone, and {n} was very sad.",
        f"One day, {n} met a {r.choice(ANIMALS)} named {m} at the {q}.",
        f"One day, {n} lost the {t} near the {q}.",
        f"One day, {m} came to the {p} and saw the {t}.",
    )))
    for _ in range(r.randrange(1, 4)):
        out.append(r.choice((
            f"\"Can you help me find my {t}?\" asked {n}.",
            f"\"Yes, I can help you,\" said {m}.",
            f"\"Do not be sad,\" said {m}. \"We will look in the {q}.\"",
            f"{n} and {m} looked in the {q} and behind the {p}.",
            f"They looked and looked, but they could not see the {t}.",
            f"{m} was {f}, and {n} was {f} too.",
            f"Then they saw something {b} under a {r.choice(THINGS)}.",
        )))
    out.append(r.choice((
        f"At last they found the {t} in the {q}.",
        f"Then {m} gave {n} a new {t}.",
        f"It was the {t}! {n} jumped with joy.",
        f"{n} said thank you and shared the {t} with {m}.",
    )))
    out.append(r.choice((
        f"{n} and {m} were best friends from that day on.",
        f"{n} was {f} and went home to sleep.",
        "They went home together, and everybody was happy. The end.",
        f"From then on, {n} always took good care of the {t}.",
    )))
    return " ".join(out)


def piece(r, form, topic):
    """A text of the given form about a topic, different at every call (20 to 60 tokens)."""
    n, a, b = r.choice(NAMES), r.choice(ADJECTIVES), r.choice(ADJECTIVES)
    p, t, v, f = r.choice(PLACES), r.choice(THINGS), r.choice(VERBS), r.choice(FEELINGS)
    opening = {
        "poem": f"O {a} {topic}, so {b} and {f},", "riddle": f"I am {a} and {b}, near the {p} I stay.",
        "letter": f"Dear {n}, I saw a {a} {topic} today.", "story": f"{n} once {v} a {a} {topic}.",
        "email": f"Hello {n}, about the {topic}: it is {a}.", "song": f"Sing of the {topic}, {a} and {b},",
        "speech": f"Friends, the {topic} is {a}.", "joke": f"Why was the {topic} so {a}?",
        "tweet": f"Just saw a {a} {topic}!", "essay": f"The {topic} is {a}, as {n} wrote.",
        "note": f"Note to {n}: the {topic} is {a}.", "recipe": f"Take a {a} {topic} and a {t}.",
    }[form]
    rest = r.choice((
        f"It {v} the {t} and stayed {b} by the {p}.",
        f"In the {p} it {v} a {t}, and {n} was {f}.",
        f"Nobody {v} the {b} {t} but {n}.",
        f"The {t} in the {p} is {b}, and {n} {v} it.",
    ))
    return f"{opening} {rest}"
