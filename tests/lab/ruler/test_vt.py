"""Variable tracking is RULER's: templates on fixed strings, chains in their order, the worked example."""

import re
from random import Random

import pytest

from baatt.lab.ruler import vt
from baatt.lab.ruler.niah import NOISE_LINE
from baatt.lab.ruler.sample import Request
from baatt.lab.ruler.sources import Sources

CHAIN = vt.Chain("54321", ("ABCDE", "FGHIJ", "KLMNO"))


class Given:
    """A generator that draws the places it is given."""

    def __init__(self, *places):
        self.places = list(places)

    def sample(self, choices, count):
        places = self.places.pop(0)
        assert len(places) == count
        assert set(places) <= set(choices)
        return places


def test_prompt_as_a_whole():
    sample = vt.ask([CHAIN], "<context>")
    assert sample.prompt == (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n<context>\n"
        "Question: Find all variables that are assigned the value 54321 in the text above."
    )
    assert sample.answer_prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        "3 variables are assigned the value 54321, they are: "
    )
    assert sample.answer == " ABCDE FGHIJ KLMNO"
    assert sample.values == ("ABCDE", "FGHIJ", "KLMNO")
    assert (sample.task, sample.answer_tokens, sample.metric) == ("vt", 30, "all")


def test_assignments_end_with_a_space_but_for_the_first():
    assert vt.assignments(CHAIN) == ["VAR ABCDE = 54321", "VAR FGHIJ = VAR ABCDE ", "VAR KLMNO = VAR FGHIJ "]


def test_a_chain_stands_in_order_at_its_places():
    """Places are sorted and counted in the noise alone; trailing spaces of assignments stay."""
    assert vt.hide([CHAIN], 4, Given([3, 0, 1])) == "\n".join([
        "VAR ABCDE = 54321",
        NOISE_LINE,
        "VAR FGHIJ = VAR ABCDE ",
        NOISE_LINE,
        NOISE_LINE,
        "VAR KLMNO = VAR FGHIJ ",
        NOISE_LINE,
    ])  # fmt: skip


def test_a_second_chain_goes_among_the_first():
    other = vt.Chain("11111", ("P", "Q"))
    lines = vt.hide([CHAIN, other], 3, Given([0, 1, 2], [1, 5])).split("\n")
    assert lines == [
        "VAR ABCDE = 54321", "VAR P = 11111", NOISE_LINE, "VAR FGHIJ = VAR ABCDE ", NOISE_LINE,
        "VAR KLMNO = VAR FGHIJ ", "VAR Q = VAR P ", NOISE_LINE,
    ]  # fmt: skip


def test_a_space_after_a_full_stop_goes(monkeypatch):
    """RULER's clean-up; the noise lines of the task have none."""
    monkeypatch.setattr(vt, "NOISE_LINE", "It is. ")
    assert vt.hide([CHAIN], 3, Given([0, 1, 2])) == (
        "VAR ABCDE = 54321\nIt is.\nVAR FGHIJ = VAR ABCDE \nIt is.\nVAR KLMNO = VAR FGHIJ \nIt is. "
    )


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (1, 1), (3, 2), (2, 12)])
def test_chains(chains, hops):
    for seed in range(10):
        drawn = vt.draw_chains(Random(seed), chains, hops, 5)
        names = [name for chain in drawn for name in chain.names]
        assert len(names) == len(set(names)) == chains * (hops + 1)
        assert all(re.fullmatch(r"[A-Z]{5}", name) for name in names)
        assert len({chain.value for chain in drawn}) == len(drawn) == chains
        assert all(re.fullmatch(r"[1-9]\d{4}", chain.value) for chain in drawn)


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (4, 2), (2, 8)])
def test_samples_ask_for_the_first_chain(chains, hops):
    """Followed through the text alone."""
    for seed in range(20):
        sample = vt.build(Random(seed), 40, chains=chains, hops=hops)
        lines = sample.prompt.split("\n")
        assert lines.count(NOISE_LINE) == sample.size == 40
        value = re.search(r"assigned the value (\d{5}) in", sample.prompt)[1]
        held, order = {}, []
        for line in lines:
            if match := re.fullmatch(r"VAR (\w+) = (?:VAR (\w+) |(\d{5}))", line):
                name, other, number = match.groups()
                held[name] = number or held[other]  # an assignment never comes before what it reads
                if held[name] == value:
                    order.append(name)
        assert len(held) == chains * (hops + 1)
        assert tuple(order) == sample.values
        assert f", {hops + 1} variables are assigned the value {value}, they are: " in sample.answer_prefix


def test_bad_dials_are_refused():
    with pytest.raises(ValueError, match="chains and hops must be at least 1, got 0 and 4"):
        vt.draw_chains(Random(0), 0, 4, 5)
    with pytest.raises(ValueError, match="at most 8788 names, got 10000"):
        vt.draw_chains(Random(0), 2000, 4, 3)
    with pytest.raises(ValueError, match=r"size must be at least hops \+ 1 = 5 lines, got 4"):
        vt.build(Random(0), 4)


def quarter(text):
    """Tokens of a tokenizer that takes four characters at once."""
    return len(text) // 4


def request(number, seed=1, count=quarter):
    return Request("vt", seed, 2048, number, Sources(), count)


def test_an_example_comes_first():
    worked = vt.ask([vt.Chain("12345", ("ABC", "DEF"))], "<example>")
    alone, sample = vt.build(Random(3), 9), vt.build(Random(3), 9, example=worked)
    assert (
        sample.prompt
        == (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n<example>\n"
            "Question: Find all variables that are assigned the value 12345 in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, "
            "2 variables are assigned the value 12345, they are:  ABC DEF\n\n"
        )
        + alone.prompt
    )
    assert sample[2:] == alone[2:]


def test_the_example_keeps_its_places_and_changes_its_names():
    recipes = [vt.recipe(request(number)) for number in range(5)]
    examples = [recipe.build(20).prompt.split("\n\nMemorize")[0] for recipe in recipes]
    assert len(set(examples)) == 5
    shapes = {re.sub(r"\b[A-Z]{3}\b(?<!VAR)", "#", re.sub(r"\d{5}", "0", text)) for text in examples}
    assert len(shapes) == 1
    values = {re.search(r"= (\d{5})", text)[1] for text in examples}
    assert len(values) == 5
    assert "12345" not in values
    other = vt.recipe(request(0, seed=2)).build(20).prompt.split("\n\nMemorize")[0]
    assert re.sub(r"\b[A-Z]{3}\b(?<!VAR)", "#", re.sub(r"\d{5}", "0", other)) not in shapes


def test_the_example_holds_up_to_500_tokens():
    """Of prompt and prefix, without its answer; names and value have fixed lengths, so the count is that of any."""
    example = vt.recipe(request(0)).build(20).prompt.split("\n\nMemorize")[0]
    question, answer = example.rsplit(" ", 5)[0], example.rsplit(" ", 5)[1:]
    assert all(re.fullmatch(r"[A-Z]{3}", name) for name in answer)
    assert quarter(question) <= 500 < quarter(question) + quarter("\n" + NOISE_LINE)


def test_an_example_of_many_hops_is_cut_at_ten_and_says_so():
    sample = vt.recipe(request(0), hops=14).build(30)
    example = sample.prompt.split("\n\nMemorize")[0]
    assert ", 11 variables are assigned" in example
    assert len(sample.values) == 15
    assert ", 15 variables are assigned" in sample.answer_prefix


def test_an_example_that_cannot_hold_500_tokens_is_as_small_as_can_be():
    sample = vt.recipe(request(0, count=len)).build(9)
    assert sample.prompt.split("\n\nMemorize")[0].count(NOISE_LINE) == 5
