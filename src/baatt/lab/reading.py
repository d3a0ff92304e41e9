"""Documents with plain statements planted in them, which are asked for in plain words.

In: a generator of random numbers, words and running text. Out: statements with their questions and answers, and the
text that holds them. Statements and what they say are drawn from templates, so that a document holds several of one
kind, whose subjects alone tell them apart.
"""

from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer

from baatt.assets import held_out_text
from baatt.lab.ruler.sources import WordPool, load_words

#: A paragraph that a document may begin with has so many characters, headings have fewer.
PARAGRAPH = 200
#: No token of running text has more characters on average.
CHARACTERS = 8

FIRST_NAMES = ("Anna", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Luis",
               "Maria", "Nora", "Oscar", "Paula", "Ravi", "Sofia", "Tom", "Ursula", "Victor", "Wendy", "Yusuf", "Zoe",
               "Mei", "Kofi", "Lena", "Omar", "Priya", "Sam")  # fmt: skip
LAST_NAMES = ("Adams", "Baker", "Clark", "Diaz", "Evans", "Fischer", "Garcia", "Hughes", "Ivanov", "Jones", "Khan",
              "Lopez", "Miller", "Novak", "Okafor", "Patel", "Quinn", "Rossi", "Smith", "Tanaka", "Unger", "Varga",
              "Weber", "Young")  # fmt: skip
CITIES = ("Paris", "London", "Tokyo", "Berlin", "Madrid", "Rome", "Cairo", "Lima", "Oslo", "Vienna", "Boston", "Sydney",
          "Toronto", "Prague", "Lisbon", "Dublin", "Chicago", "Mumbai", "Nairobi", "Seoul")  # fmt: skip
JOBS = ("teacher", "nurse", "baker", "pilot", "lawyer", "farmer", "painter", "plumber", "doctor", "librarian",
        "chemist", "gardener", "carpenter", "journalist", "translator")  # fmt: skip
PLACES = ("kitchen", "garage", "attic", "cellar", "library", "garden shed", "office", "car", "blue box", "top drawer",
          "barn", "hallway", "bank vault", "suitcase")  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange", "brown", "grey", "pink", "silver")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
#: Statement, question and answer; {subject} tells statements of one kind apart, {value} is what is asked for.
TEMPLATES = (
    ("thing", "number", "The access code for the {subject} is {value}.", "What is the access code for the {subject}?",
     "The access code for the {subject} is {value}."),
    ("thing", "number", "To open the {subject}, enter {value}.", "What do you have to enter to open the {subject}?",
     "To open the {subject}, you have to enter {value}."),
    ("name", "number", "The phone number of {subject} is {value}.", "What is the phone number of {subject}?",
     "The phone number of {subject} is {value}."),
    ("name", "number", "The order number of {subject} is {value}.", "Which order number does {subject} have?",
     "The order number of {subject} is {value}."),
    ("thing", "amount", "The {subject} costs {value} dollars.", "How much does the {subject} cost?",
     "The {subject} costs {value} dollars."),
    ("name", "amount", "{subject} has {value} books.", "How many books does {subject} have?",
     "{subject} has {value} books."),
    ("thing", "name", "The {subject} belongs to {value}.", "Who owns the {subject}?",
     "The {subject} belongs to {value}."),
    ("thing", "name", "{value} wrote the report about the {subject}.", "Who wrote the report about the {subject}?",
     "{value} wrote the report about the {subject}."),
    ("name", "city", "{subject} lives in {value}.", "Where does {subject} live?", "{subject} lives in {value}."),
    ("thing", "city", "The {subject} was made in {value}.", "In which city was the {subject} made?",
     "The {subject} was made in {value}."),
    ("name", "job", "{subject} works as a {value}.", "What is the job of {subject}?", "{subject} works as a {value}."),
    ("thing", "place", "The key for the {subject} is in the {value}.", "Where is the key for the {subject}?",
     "The key for the {subject} is in the {value}."),
    ("thing", "colour", "The {subject} is painted {value}.", "What color is the {subject}?",
     "The {subject} is {value}."),
    ("name", "colour", "The favorite color of {subject} is {value}.", "What is the favorite color of {subject}?",
     "The favorite color of {subject} is {value}."),
    ("name", "day", "{subject} comes on {value}.", "On which day does {subject} come?", "{subject} comes on {value}."),
    ("thing", "date", "The {subject} has to be ready on {value}.", "When does the {subject} have to be ready?",
     "The {subject} has to be ready on {value}."),
    ("thing", "word", "The password for the {subject} is {value}.", "What is the password for the {subject}?",
     "The password for the {subject} is {value}."),
    ("name", "word", "The dog of {subject} is called {value}.", "What is the name of {subject}'s dog?",
     "The dog of {subject} is called {value}."),
)  # fmt: skip


class Fact(NamedTuple):
    """A statement of the document, what asks for it, the answer, and what that must say."""

    statement: str
    question: str
    answer: str
    value: str


def draw_value(kind: str, random: Random, words: WordPool) -> str:
    """A subject or value of a kind that `TEMPLATES` name."""
    choices = {"city": CITIES, "job": JOBS, "place": PLACES, "colour": COLOURS, "day": DAYS}
    if kind in choices:
        return random.choice(choices[kind])
    if kind == "number":
        return str(random.randrange(10**3, 10 ** random.randint(4, 7)))
    if kind == "amount":
        return str(random.randint(2, 999))
    if kind == "name":
        return f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"
    if kind == "date":
        return f"{random.choice(MONTHS)} {random.randint(1, 28)}"
    if kind == "thing":
        return f"{random.choice(words.adjectives)} {random.choice(words.nouns)}"
    return random.choice(words.nouns).capitalize()


def draw_facts(random: Random, words: WordPool, count: int) -> list[Fact]:
    """Facts of a few templates, each with a subject of its own."""
    templates = random.sample(TEMPLATES, min(len(TEMPLATES), random.randint(1, 4)))
    facts, seen = [], set[tuple[str, str]]()
    for _ in range(count):
        about, said, statement, question, answer = random.choice(templates)
        subject, value = draw_value(about, random, words), draw_value(said, random, words)
        if (statement, subject) in seen:
            continue
        seen.add((statement, subject))
        named = {"subject": subject, "value": value}
        facts.append(Fact(statement.format(**named), question.format(**named), answer.format(**named), value))
    return facts


def document_with(facts: list[Fact], text: str, random: Random) -> str:
    """Running text with the statements of facts between its sentences."""
    sentences = text.removesuffix(".").split(". ")
    for fact in facts:
        sentences.insert(random.randint(0, len(sentences)), fact.statement.removesuffix("."))
    return ". ".join(sentences) + "."


def held_out_document(tokenizer: Tokenizer, tokens: int, seed: int, count: int = 8) -> tuple[str, list[Fact]]:
    """Held-out text from the beginning of a paragraph on, with statements of held-out words between its sentences.

    Args:
        tokens: of text and statements together, at most; a sentence is not cut off.
        seed: which text and statements.
        count: of statements, at most.

    Raises:
        ValueError: fewer tokens than the statements and a sentence need, or more than the text has.
    """
    random, text = Random(seed), held_out_text()
    facts = draw_facts(random, load_words("heldout"), count)
    # Wherever a statement stands, a space and a full stop are added at most.
    room = tokens - sum(len(tokenizer.encode(f" {fact.statement}").ids) + 2 for fact in facts)
    starts, place = list[int](), 0
    for paragraph in text.splitlines(keepends=True):
        if len(paragraph) >= PARAGRAPH and place + CHARACTERS * room <= len(text):
            starts.append(place)
        place += len(paragraph)
    if not starts:
        raise ValueError(
            f"tokens must be at most {len(text) // CHARACTERS} of the text shipped with baatt, got {tokens}"
        )
    start = random.choice(starts)
    encoded = tokenizer.encode(text[start : start + CHARACTERS * max(room, 0)])
    end = encoded.offsets[room - 1][1] if 0 < room <= len(encoded.offsets) else 0
    sentences, found, _ = text[start : start + end].rpartition(". ")
    if not found:
        raise ValueError(f"tokens must hold {len(facts)} statements and a sentence at least, got {tokens}")
    return document_with(facts, sentences, random), facts
