"""Tasks that the small model is trained on and judged by, generated from a seed.

Each generator takes (r, size): a random.Random and a rough number of characters to fill, and
returns a conversation, a list of (role, text) turns in which the assistant's turns are what is
to be learned. Definitions follow RULER (needles, variable tracking, common and frequent words),
MRCR (the i-th of several like requests) and the synthetic tasks of the Kimi Linear report
(palindromes, MQAR, stacks). TASKS maps names to generators; HELD_OUT_SEED starts the seeds that
training never uses.
"""

import string
import uuid

from words import ADJECTIVES, ANIMALS, FILLER, FORMATS, THINGS, piece, sentence, story

HELD_OUT_SEED = 1 << 40
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]


# ---- needles ---------------------------------------------------------------------------------
def number(r):
    return str(r.randrange(1_000_000, 10_000_000))


def word(r):
    return f"{r.choice(ADJECTIVES)}-{r.choice(THINGS)}"


def uuid4(r):
    return str(uuid.UUID(int=r.getrandbits(128), version=4))


KINDS = {"numbers": number, "words": word, "uuids": uuid4}


def distinct(r, make, n):
    out = []
    while len(out) < n:
        x = make(r)
        if x not in out:
            out.append(x)
    return out


def join(items):
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


def filler_lines(r, kind, size):
    """Lines of haystack worth about `size` characters."""
    out, used = [], 0
    if kind == "noise":
        line = FILLER[0]
        return [line] * max(1, size // (len(line) + 1))
    while used < size:
        out.append(sentence(r))
        used += len(out[-1]) + 1
    return out or [sentence(r)]


def hide(r, lines, hidden):
    """Put the lines of `hidden` somewhere into `lines`, in their order."""
    places = sorted(r.randrange(len(lines) + 1) for _ in hidden)
    for at, text in reversed(list(zip(places, hidden, strict=True))):
        lines.insert(at, text)


def needles(r, size, n_keys=1, n_values=1, n_queries=1, key=None, value=None, haystack=None,
            turns=None):  # fmt: skip
    """Hidden `One of the special magic ...` lines, then questions about some of the keys."""
    value = value or r.choice(("numbers", "numbers", "words", "uuids"))
    key = key or ("uuids" if r.random() < 0.1 else "words")
    haystack = haystack or r.choice(("noise", "prose", "needles"))
    n_keys = max(n_keys, n_queries)
    keys = distinct(r, KINDS[key], n_keys)
    values = {k: [KINDS[value](r) for _ in range(n_values)] for k in keys}

    def needle(k, v):
        return f"One of the special magic {value} for {k} is: {v}."

    if haystack == "needles":
        line = len(needle(keys[0], values[keys[0]][0])) + 1
        lines = [needle(KINDS[key](r), KINDS[value](r)) for _ in range(max(1, size // line))]
    else:
        lines = filler_lines(r, haystack, size)
    hidden = [needle(k, v) for k in keys for v in values[k]]
    r.shuffle(hidden)
    hide(r, lines, hidden)
    order = {k: [] for k in keys}  # values in the order of the text
    for text in hidden:
        for k in keys:
            if f"for {k} is: " in text:
                order[k].append(text.split(" is: ")[1][:-1])
    context = ("\n" if haystack != "prose" else " ").join(lines)

    one = n_queries * n_values == 1
    kind = value[:-1] if one else value
    intro = (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards."
        if one else
        f"Some special magic {kind} are hidden within the following text. Make sure to memorize "
        f"them. I will quiz you about the {kind} afterwards."
    )  # fmt: skip
    out = []
    asked = turns or r.randrange(1, 4)
    for i in range(asked):
        query = r.sample(keys, n_queries)
        answers = [v for k in query for v in order[k]]
        about = join(query)
        question = (
            f"What is the special magic {kind} for {about} mentioned in the provided text?"
            if one else
            f"What are all the special magic {kind} for {about} mentioned in the provided text?"
        )  # fmt: skip
        verb = "is" if one else "are"
        user = f"{intro}\n{context}\n{question}" if i == 0 else question
        out.append(("user", user))
        out.append(("assistant", f"The special magic {kind} for {about} mentioned in the provided "
                                 f"text {verb} {join(answers)}."))  # fmt: skip
    return out


def single(r, size, **kw):
    return needles(r, size, **kw)


def multikey(r, size, n=4, **kw):
    return needles(r, size, n_keys=n, **kw)


def multivalue(r, size, n=4, **kw):
    return needles(r, size, n_values=n, **kw)


def multiquery(r, size, n=4, **kw):
    return needles(r, size, n_queries=n, **kw)


def nth_value(r, size):
    """Several values for each of a few keys; which came first, second, ... for a key."""
    value = r.choice(("numbers", "words"))
    keys = distinct(r, word, r.randrange(1, 5))
    values = {k: distinct(r, KINDS[value], r.randrange(2, 7)) for k in keys}
    left = [k for k in keys for _ in values[k]]
    r.shuffle(left)
    lines, seen = filler_lines(r, r.choice(("noise", "prose")), size), dict.fromkeys(keys, 0)
    hidden = []
    for k in left:
        hidden.append(f"One of the special magic {value} for {k} is: {values[k][seen[k]]}.")
        seen[k] += 1
    hide(r, lines, hidden)
    out, kind = [], value[:-1]
    for i in range(r.randrange(2, 7)):
        k = r.choice(keys)
        j = r.randrange(len(values[k]))
        ask = f"What is the {ORDINALS[j]} special magic {kind} for {k} mentioned in the provided text?"
        out.append(("user", "\n".join([*lines, ask]) if i == 0 else ask))
        out.append(("assistant", f"The {ORDINALS[j]} special magic {kind} for {k} is {values[k][j]}."))
    return out


# ---- conversations ---------------------------------------------------------------------------
def request(form, topic):
    return f"Write {'an' if form[0] in 'aeiou' else 'a'} {form} about the {topic}."


def prepend(r, form, topic, i, text):
    """The question of MRCR for the i-th of like answers, and its answer."""
    code = "".join(r.choice(string.ascii_letters + string.digits) for _ in range(10))
    ask = (f"Prepend {code} to the {ORDINALS[i]} {form} about the {topic}. "
           "Do not include any other text in your response.")  # fmt: skip
    return [("user", ask), ("assistant", f"{code}{text}")]


def requests(r, size, short):
    """Requests drawn from a few, with their answers: ([(form, topic)], [text])."""
    n = max(3, int(size / (100 if short else 190)))
    forms, topics = r.sample(FORMATS, r.randrange(1, 7)), r.sample(ANIMALS, r.randrange(2, 13))
    kinds = distinct(r, lambda r: (r.choice(forms), r.choice(topics)),
                     min(max(1, n // r.randrange(2, 5)), len(forms) * len(topics) // 2 + 1))  # fmt: skip
    asks = [r.choice(kinds) for _ in range(n)]
    texts = [piece(r, *ask) for ask in asks]
    return asks, [t.split(". ")[0].split("? ")[0] for t in texts] if short else texts


def mrcr_many(r, size):
    """MRCR with several repeated requests and several questions about them."""
    asks, texts = requests(r, size * 0.7, r.random() < 0.5)
    out, seen = [], {}
    for ask, text in zip(asks, texts, strict=True):
        seen.setdefault(ask, []).append(text)
        out += [("user", request(*ask)), ("context", text)]
    often = [ask for ask in seen if len(seen[ask]) > 1] or list(seen)
    for _ in range(max(2, min(8, size // 600))):
        ask = r.choice(often)
        i = r.randrange(min(len(seen[ask]), len(ORDINALS)))
        out += prepend(r, *ask, i, seen[ask][i])
    return out


def which(r, size):
    """How many like requests there have been: asked after many of them."""
    asks, texts = requests(r, size * 0.6, r.random() < 0.7)
    out, count = [], {}
    for ask, text in zip(asks, texts, strict=True):
        count[ask] = count.get(ask, 0) + 1
        out += [("user", request(*ask)), ("context", text)]
        if count[ask] <= len(ORDINALS) and r.random() < 0.6:
            form, topic = ask
            out += [("user", f"Which {form} about the {topic} was that?"),
                    ("assistant", f"The {ORDINALS[count[ask] - 1]}.")]  # fmt: skip
    if out[-1][0] != "assistant":
        form, topic = asks[-1]
        out += [("user", f"How many times did I ask for a text like the {form} about the {topic}?"),
                ("assistant", f"{count[asks[-1]]}.")]  # fmt: skip
    return out


def mrcr(r, size, n=None, turns=None):
    """Return the i-th of n answers to one and the same request among other requests."""
    n = n or r.randrange(1, 5)
    target = (r.choice(FORMATS), r.choice(ANIMALS))
    others, used = [], 0
    while used < size or not others:
        ask = (r.choice(FORMATS), r.choice(ANIMALS))
        if r.random() < 0.3:  # a near miss shares the form or the topic
            ask = (target[0], ask[1]) if r.random() < 0.5 else (ask[0], target[1])
        if ask != target:
            others.append(ask)
            used += 190
    asks = others + [target] * n
    r.shuffle(asks)
    out, seen = [], []
    for ask in asks:
        text = piece(r, *ask)
        if ask == target:
            seen.append(text)
        out += [("user", request(*ask)), ("context", text)]
    for i in r.sample(range(n), min(n, turns or 2)):
        out += prepend(r, *target, i, seen[i])
    return out


# ---- lists -----------------------------------------------------------------------------------
def items(r, n):
    pool = r.choice((ANIMALS, THINGS, ADJECTIVES, None))
    if pool is None:
        return [str(r.randrange(1000)) for _ in range(n)]
    return [r.choice(pool) for _ in range(n)]


def copy(r, size):
    out = []
    for _ in range(max(1, size // 800)):
        seq = " ".join(items(r, r.randrange(2, max(3, min(60, size // 14)))))
        out += [("user", f"Repeat this text exactly: {seq}"), ("assistant", seq)]
    return out


def reverse(r, size):
    out = []
    for _ in range(max(1, size // 800)):
        seq = items(r, r.randrange(2, max(3, min(30, size // 14))))
        out += [("user", f"Write these words in reverse order: {' '.join(seq)}"),
                ("assistant", " ".join(reversed(seq)))]  # fmt: skip
    return out


def mqar(r, size, n=None, queries=None):
    """Key-value pairs, then several keys to answer."""
    n = n or r.randrange(2, max(3, min(64, size // 20)))
    keys = r.sample(THINGS, min(n, len(THINGS)))
    value = {k: str(r.randrange(1000)) for k in keys}
    pairs = ", ".join(f"{k} {value[k]}" for k in keys)
    asked = [r.choice(keys) for _ in range(queries or min(16, 2 * n))]
    out = [("user", f"Remember these pairs: {pairs}. What is the value of {asked[0]}?"),
           ("assistant", value[asked[0]])]  # fmt: skip
    for k in asked[1:]:
        out += [("user", f"What is the value of {k}?"), ("assistant", value[k])]
    return out


def stack(r, size):
    """Several stacks of words; report what each pop returns, at the end or as they come."""
    n_stacks, held, steps, popped, out = r.randrange(1, 9), {}, [], [], []
    at_once, written = r.random() < 0.4, 0
    while written < min(size, 2500) or not popped:
        s = r.randrange(n_stacks)
        if held.get(s) and r.random() < 0.5:
            popped.append(held[s].pop())
            steps.append(f"pop {s}")
        else:
            held.setdefault(s, []).append(r.choice(THINGS))
            steps.append(f"push {s} {held[s][-1]}")
        written += len(steps[-1])
        if popped and not at_once and len(steps) > 3:
            out += [("user", "\n".join(steps)), ("assistant", " ".join(popped))]
            steps, popped, written = [], [], written + 20
            if written >= min(size, 2500):
                break
    if steps and popped:
        out += [("user", "\n".join(steps)), ("assistant", " ".join(popped))]
    intro = "Follow these stack operations and list what each pop returns.\n"
    return [("user", intro + out[0][1]), *out[1:]]


def variables(r, size, hops=None):
    """Variable tracking: a chain of assignments in noise; name all that hold the value."""
    hops = hops or r.randrange(1, 5)
    names = distinct(r, lambda r: "".join(r.choice(string.ascii_uppercase) for _ in range(5)), 2 * hops + 2)
    chains, lines = [names[: hops + 1], names[hops + 1 :]], filler_lines(r, "noise", size)
    values = [str(r.randrange(10000, 99999)) for _ in chains]
    for chain, v in zip(chains, values, strict=True):
        code = [f"VAR {chain[0]} = {v}"]
        code += [f"VAR {b} = VAR {a}" for a, b in zip(chain, chain[1:], strict=False)]
        hide(r, lines, code)
    i = r.randrange(2)
    return [("user", "Memorize and track the chain of variable assignment hidden in the following text.\n"
                     + "\n".join(lines) +
                     f"\nQuestion: Find all variables that are assigned the value {values[i]} in the text above."),
            ("assistant", " ".join(chains[i]))]  # fmt: skip


def common_words(r, size, n=None):
    """The most frequent words of a numbered list, most frequent first among equals by list order."""
    n = n or r.randrange(1, 6)
    total = max(20, min(size // 9, 400))
    pool = r.sample(sorted(set(THINGS + ADJECTIVES)), min(len(THINGS), n + max(6, total // 4)))
    words = pool[:n] * max(4, total // (3 * n))
    words += [w for w in pool[n:] for _ in range(2)][: max(4, total - len(words))]
    r.shuffle(words)
    first = sorted(pool[:n], key=words.index)
    listed = " ".join(f"{i + 1}. {w}" for i, w in enumerate(words))
    which = "word is the most common" if n == 1 else f"are the {n} most common words"
    return [("user", "Below is a numbered list of words. In these words, some appear more often "
                     f"than others. Memorize the ones that appear most often.\n{listed}\n"
                     f"Question: What {which} in the above list?"),
            ("assistant", " ".join(first))]  # fmt: skip


# ---- English and manners ---------------------------------------------------------------------
def tell(r, size):
    out = []
    for _ in range(max(1, size // 700)):
        x = r.choice(ANIMALS)
        text = story(r)
        while x not in text.split(".")[0]:
            text = story(r)
        out += [("user", r.choice((f"Tell me a story about a {x}.", f"Write a short story about a {x}.",
                                   f"Please tell a story with a {x}."))), ("assistant", text)]  # fmt: skip
    return out


def manners(r, size):
    pairs = [
        (("Hello!", "Hi", "Hello", "Hi there!"), "Hello! How can I help you?"),
        (("Who are you?", "What are you?", "What is your name?"),
         "I am a very small Kimi Linear model. I can find things in a text, remember pairs, and tell simple stories."),
        (("Thank you!", "Thanks"), "You are welcome!"),
        (("What can you do?", "How can you help me?"),
         "I can find needles in a long text, repeat and reverse words, remember pairs, and tell simple stories."),
        (("Goodbye!", "Bye"), "Goodbye!"),
    ]  # fmt: skip
    out = []
    for asks, answer in r.sample(pairs, r.randrange(1, 4)):
        out += [("user", r.choice(asks)), ("assistant", answer)]
    return out


TASKS = {
    "single": single, "multikey": multikey, "multivalue": multivalue, "multiquery": multiquery,
    "nth_value": nth_value, "mrcr": mrcr, "mrcr_many": mrcr_many, "which": which, "copy": copy, "reverse": reverse, "mqar": mqar, "stack": stack,
    "variables": variables, "common_words": common_words, "tell": tell, "manners": manners,
}  # fmt: skip
