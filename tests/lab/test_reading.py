"""Statements that differ in their subjects, stand in the document and are answered by their values."""

from random import Random

from baatt.lab.reading import document_with, draw_facts
from baatt.lab.ruler.sources import load_words


def test_facts_differ_in_their_subjects_and_their_answers_say_the_value():
    random = Random(1)
    for _ in range(50):
        facts = draw_facts(random, load_words("heldout"), 10)
        assert len({fact.question for fact in facts}) == len(facts)
        text = document_with(facts, "One. Two. Three.", random)
        for fact in facts:
            assert fact.statement in text
            assert fact.value in fact.answer
