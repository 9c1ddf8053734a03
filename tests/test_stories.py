"""The story grammar: seeded, varied, correct in the small things, and fast."""

import itertools
import re
from collections import Counter

import pytest

from creature.data.text.readers import MARKER, Documents
from creature.data.text.sources import find_sources
from creature.data.text.stories import BOYS, GIRLS, PLOTS, generate_stories, write_story_corpus
from creature.data.text.tokenizer import load_encoding
from creature.errors import UserError


@pytest.fixture(scope="module")
def stories():
    return list(itertools.islice(generate_stories(3), 1500))


def test_the_seed_decides_the_stories(stories):
    assert list(itertools.islice(generate_stories(3), 50)) == stories[:50]
    assert list(itertools.islice(generate_stories(4), 50)) != stories[:50]


def test_no_story_twice_and_openings_vary(stories):
    assert len(set(stories)) == len(stories)
    openings = Counter(" ".join(story.split()[:12]) for story in stories)
    assert len(openings) > 0.9 * len(stories) and openings.most_common(1)[0][1] <= 0.01 * len(stories)
    kinds = Counter(story.split("\n\n")[1].split()[0] for story in stories)
    assert len(kinds) > len(PLOTS)


def test_nothing_of_the_grammar_is_left_in_the_text(stories):
    for story in stories:
        assert not re.search(r"[\[\]{}|<>]|\(n\)|  | [.,!?]|\.\.|,\.| \n", story), story
        assert story.count('"') % 2 == 0, story
        assert 80 < len(story.split()) < 300


def test_articles_and_capitals_are_right(stories):
    text = "\n".join(stories)
    assert not re.search(r"\b[Aa] (?:[aeiouAEIOU]|hon)", text)
    assert not re.search(r"\b[Aa]n (?![aeiouAEIOU]|hon)", text)
    assert not re.search(r"(?:^|[.!?] |\n)[a-z]", text, re.M)


def test_pronouns_agree_with_the_hero(stories):
    # Stories of two girls have no word of the other sex, nor have those of two boys without a woman in them.
    checked = [0, 0]
    for story in stories:
        names = set(re.findall(r"[A-Z][a-z]+", story)) & {*GIRLS, *BOYS}
        if names <= set(GIRLS):
            checked[0] += 1
            assert not re.search(r"\b(?:he|him|his|boy)\b", story), story
        if names <= set(BOYS) and not re.search("mother|aunt|woman", story):
            checked[1] += 1
            assert not re.search(r"\b(?:she|her|girl)\b", story), story
    assert min(checked) > 100


def test_the_sample_corpus_is_long_enough_and_read_back_story_for_story(tmp_path):
    path = tmp_path / "stories.txt"
    counts = write_story_corpus(path, tokens=300_000, seed=5)
    assert 300_000 <= counts["tokens"] < 301_000
    sources, _ = find_sources([str(path)])
    *read, last = Documents(sources[0]).whole()
    assert last == ""  # a marker ends the file
    assert read == list(itertools.islice(generate_stories(5), counts["stories"]))
    assert sum(len(load_encoding().encode_ordinary(story)) + 1 for story in read) == counts["tokens"]
    assert path.read_text(encoding="utf-8").endswith(f"\n{MARKER}\n")


def test_a_senseless_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="--tokens 0"):
        write_story_corpus(tmp_path / "x.txt", tokens=0)
    assert not list(tmp_path.iterdir())
