"""The eight tasks, built from packages: the same examples in the same order every time."""

from __future__ import annotations

import email
import email.message
import json
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packages import BROWN, FORTUNES, SPAM_ASSASSIN, VADER, WORDNET, Package, unpacked

VERSION = 1  # of the examples: a change of anything below needs another one
_SEED = 0
TRAIN, TEST = 9_000, 1_000


@dataclass(frozen=True)
class Example:
    """A text, or a pair of them, its label, and the document that it is from where a document has many."""

    text: str
    label: str
    pair: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Task:
    """What a task asks, how its examples are found in its packages, and how an expert is trained for it."""

    name: str
    about: str
    packages: tuple[Package, ...]
    find: Callable[..., Iterator[Example]]
    steps: int
    rate: float
    batch: int
    tokens: int
    most: int | None = None  # examples of one label


# --- spam assassin ---------------------------------------------------------------------------------------------


def find_spam(root: Path) -> Iterator[Example]:
    """Subject and beginning of the body of every message."""
    for file in sorted((root / "package" / "data").glob("*-*/*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        message = email.message_from_string(content["text"])
        text = f"{message.get('subject', '')} {_body(message)}"
        yield Example(_plain(text)[:600], "spam" if content["group"].startswith("spam") else "ham")


def _body(message: email.message.Message) -> str:
    for part in message.walk():
        if part.get_content_maintype() == "text":
            content = part.get_payload(decode=True)
            return content.decode("latin-1") if isinstance(content, bytes) else ""
    return ""


def _plain(text: str) -> str:
    """Without markup, in one line."""
    without = re.sub(r"<(style|script).*?</\1>|<[^>]{0,400}>|&\w+;", " ", text, flags=re.DOTALL | re.IGNORECASE)
    return " ".join(without.split())


# --- the Brown corpus ------------------------------------------------------------------------------------------

_GENRES = {
    "press": ("news", "editorial", "reviews"),
    "learned": ("learned",),
    "government": ("government",),
    "religion": ("religion",),
    "hobbies": ("hobbies",),
    "fiction": ("fiction", "mystery", "science_fiction", "adventure", "romance"),
}
_SPAN = 3  # at most so far apart are the two words that are swapped


def find_genre(root: Path) -> Iterator[Example]:
    genre_of = {name: genre for genre, names in _GENRES.items() for name in names}
    for document, category, words in _brown(root):
        if category in genre_of:
            yield Example(_joined(words), genre_of[category], group=document)


def find_acceptability(root: Path) -> Iterator[Example]:
    """Every other sentence has two nearby words swapped."""
    rng = random.Random(_SEED)
    for number, (document, _, words) in enumerate(_brown(root)):
        lower = [word.lower() for word in words]  # a capital would tell which word was first
        if number % 2 == 0:
            yield Example(_joined(lower), "intact", group=document)
            continue
        swapped = _swapped(lower, rng)
        if swapped is not None:
            yield Example(_joined(swapped), "swapped", group=document)


def _swapped(words: Sequence[str], rng: random.Random) -> list[str] | None:
    """With two different words exchanged, of which neither is a sign."""
    places = [i for i, word in enumerate(words) if word.isalpha()]
    pairs = [(i, j) for i in places for j in places if 0 < j - i <= _SPAN and words[i] != words[j]]
    if not pairs:
        return None
    i, j = rng.choice(pairs)
    return [*words[:i], words[j], *words[i + 1 : j], words[i], *words[j + 1 :]]


def _brown(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Document, category and words of every sentence of middle length."""
    folder = root / "package"
    for line in (folder / "cats.txt").read_text().splitlines():
        document, category = line.split()[:2]
        for row in (folder / document).read_text().splitlines():
            words = [word.rpartition("/")[0] for word in row.split()]
            if 6 <= len(words) <= 36:
                yield document, category, words


def _joined(words: Sequence[str]) -> str:
    text = " ".join(words).replace("``", '"').replace("''", '"')
    return re.sub(r" ([.,;:?!)])", r"\1", text)


# --- WordNet ---------------------------------------------------------------------------------------------------

_NOUNS, _VERBS = range(3, 29), range(29, 44)  # the lexicographers' files


@dataclass(frozen=True)
class Synset:
    word: str
    file: int
    gloss: str
    above: tuple[str, ...]  # offsets of its hypernyms


def find_nouns(root: Path) -> Iterator[Example]:
    return (Example(s.gloss, str(s.file)) for s in _synsets(root, "noun").values() if s.file in _NOUNS)


def find_verbs(root: Path) -> Iterator[Example]:
    return (Example(s.gloss, str(s.file)) for s in _synsets(root, "verb").values() if s.file in _VERBS)


def find_hypernyms(root: Path) -> Iterator[Example]:
    """A noun and its hypernym, or that of another noun drawn from the same ones: each side tells nothing by itself."""
    rng = random.Random(_SEED)
    synsets = _synsets(root, "noun")
    pairs = [(s.word, synsets[s.above[0]].word) for s in synsets.values() if s.above]
    rng.shuffle(pairs)
    half = (TRAIN + TEST) // 2 + 1_000
    true, others = pairs[:half], pairs[half : 2 * half]
    strange = [upper for _, upper in others]
    rng.shuffle(strange)
    yield from (Example(word, "hypernym", pair=upper) for word, upper in true)
    for (word, own), upper in zip(others, strange, strict=True):
        if own != upper:
            yield Example(word, "random", pair=upper)


def _synsets(root: Path, part: str) -> dict[str, Synset]:
    """`offset file type count(hex) word id ... count pointer offset ... | gloss; examples` (wndb(5WN))."""
    found = {}
    for line in (root / "usr" / "share" / "wordnet" / f"data.{part}").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue  # the licence
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        first = 4 + 2 * int(fields[3], 16)
        pointers = fields[first + 1 : first + 1 + 4 * int(fields[first])]
        above = tuple(offset for sign, offset in zip(pointers[::4], pointers[1::4], strict=True) if sign == "@")
        definition = re.split(r';\s*"', gloss)[0].strip()
        found[fields[0]] = Synset(fields[4].replace("_", " "), int(fields[1]), definition, above)
    return found


# --- vaderSentiment's ratings ----------------------------------------------------------------------------------


def find_sentiment(root: Path) -> Iterator[Example]:
    """Snippets of reviews of films and of goods, by the sign of their mean rating; the undecided are left out."""
    (archive,) = root.glob("*/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(archive) as content:
        for kind in ("movie", "amazon"):
            file = content.extractfile(f"hutto_ICWSM_2014/{kind}ReviewSnippets_GroundTruth.txt")
            assert file is not None
            for line in file.read().decode("utf-8", "replace").splitlines():
                _, score, text = line.split("\t", 2)
                if abs(float(score)) > 0.5:
                    yield Example(" ".join(text.split()), "positive" if float(score) > 0 else "negative")


# --- fortunes --------------------------------------------------------------------------------------------------

_DRAWINGS = {"art", "ascii-art"}
_CATEGORIES = 15


def find_fortunes(*roots: Path) -> Iterator[Example]:
    """The fifteen files with most quotations; what two of them hold is left out."""
    quotations: dict[str, list[str]] = {}
    for file in sorted(path for root in roots for path in (root / "usr/share/games/fortunes").glob("*.dat")):
        if file.stem not in _DRAWINGS:
            text = file.with_suffix("").read_text(encoding="utf-8")
            quotations[file.stem] = [q for q in (" ".join(p.split())[:600] for p in text.split("\n%\n")) if q]
    largest = sorted(quotations, key=lambda name: (-len(quotations[name]), name))[:_CATEGORIES]
    return (Example(text, name) for name in largest for text in quotations[name])


# --- the eight -------------------------------------------------------------------------------------------------

TASKS = (
    Task("spam", "spam or ham", (SPAM_ASSASSIN,), find_spam, 250, 3e-5, 32, 40),
    Task("genre", "genre of a sentence", (BROWN,), find_genre, 500, 5e-5, 32, 40, most=1_700),
    Task("acceptability", "intact, or two words swapped", (BROWN,), find_acceptability, 800, 1e-4, 32, 32),
    Task("noun", "supersense of a noun's gloss", (WORDNET,), find_nouns, 700, 8e-5, 32, 32, most=500),
    Task("verb", "supersense of a verb's gloss", (WORDNET,), find_verbs, 600, 7e-5, 32, 32, most=1_200),
    Task("hypernym", "hypernym, or another's", (WORDNET,), find_hypernyms, 600, 6e-5, 32, 32),
    Task("sentiment", "sentiment of a snippet", (VADER,), find_sentiment, 500, 4e-5, 24, 40),
    Task("quotation", "category of a quotation", FORTUNES, find_fortunes, 500, 5e-5, 20, 40),
)
QUICK = ("spam", "verb", "hypernym", "sentiment")


def build(task: Task, cache: Path) -> Path:
    """The folder of a task's train.jsonl, test.jsonl and labels.json, written once."""
    folder = cache / "tasks" / f"{task.name}-v{VERSION}"
    if (folder / "labels.json").is_file():
        return folder
    examples = list(task.find(*(unpacked(package, cache) for package in task.packages)))
    train, test = split(chosen(examples, task.most))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(_line(example) for example in part), encoding="utf-8")
    labels = sorted({example.label for example in train})
    (folder / "labels.json").write_text(json.dumps(labels) + "\n")
    return folder


def chosen(examples: Iterable[Example], most: int | None) -> list[Example]:
    """Shuffled, texts that come twice once, those under two labels never, and at most so many of a label."""
    by_text: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in examples:
        by_text[_key(example)].append(example)
    unique = [same[0] for same in by_text.values() if len({example.label for example in same}) == 1]
    random.Random(_SEED).shuffle(unique)
    counts: dict[str, int] = defaultdict(int)
    kept = []
    for example in unique:
        counts[example.label] += 1
        if most is None or counts[example.label] <= most:
            kept.append(example)
    return kept


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, no document in both: 1,000 held out, or a sixth where there are few."""
    wanted = min(TEST, len(examples) // 6)
    groups = {example.group for example in examples if example.group is not None}
    held: set[str | None] = set()
    if groups:
        order = sorted(groups)
        random.Random(_SEED).shuffle(order)
        held = set(order[: len(order) // 6])
    test = [e for e in examples if e.group in held][:wanted] if groups else list(examples[:wanted])
    apart = set(map(_key, test))
    train = [e for e in examples if e.group not in held and _key(e) not in apart]
    return train[:TRAIN], test


def _key(example: Example) -> tuple[str, str]:
    """What makes two texts the same: case, signs and spaces aside."""
    return _words(example.text), _words(example.pair or "")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _line(example: Example) -> str:
    row: dict[str, Any] = {"text": example.text}
    if example.pair is not None:
        row["text_pair"] = example.pair
    return json.dumps(row | {"label": example.label}, ensure_ascii=False) + "\n"


def read(folder: Path, part: str) -> list[dict[str, str]]:
    with open(folder / f"{part}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
