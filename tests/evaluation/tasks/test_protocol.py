"""Protocols of the model families.

Oracles: the published settings written out, and what encoders make of a text.
"""

import pytest
from transformers import BartConfig, T5Config

from metro.data.prompts.encoding import PromptEncoder
from metro.evaluation.tasks.examples import EvaluationExample
from metro.evaluation.tasks.protocol import PROTOCOLS, choose_protocol
from metro.modeling.configuration_metro_t5 import MetroT5Config


def test_families_have_their_published_settings():
    """Oracle: METRO-T0's, T0's and FLIPPED's evaluation scripts."""
    metro, t0, flipped = (PROTOCOLS[name] for name in ("metro", "t0", "flipped"))
    assert metro.source_special_tokens and not t0.source_special_tokens
    assert metro.lengths("rte") == t0.lengths("rte") == (512, 256)
    assert flipped.lengths("rte") == (512, 64)
    assert flipped.lengths("hellaswag") == (256, 64)
    assert flipped.lengths("story_cloze") == (256, 128)
    assert flipped.lengths("wsc") == flipped.lengths("winogrande") == (512, 128)


def test_family_follows_the_registry_then_the_kind_of_model():
    """Oracle: by hand."""
    metro = MetroT5Config(max_positions=1024)
    assert choose_protocol(None, metro, "direct").family == "metro"
    assert choose_protocol(None, T5Config(), "direct").family == "t5"
    assert choose_protocol("t0", T5Config(), "direct").family == "t0"


def test_lengths_fit_the_position_table_and_the_method():
    """Oracle: by hand. T5 has no table; channel's targets are prompts."""
    small = choose_protocol(None, MetroT5Config(max_positions=100), "direct")
    assert small.lengths("rte") == (100, 100)
    bart = choose_protocol(None, BartConfig(max_position_embeddings=64), "flipped")
    assert bart.lengths("rte") == (64, 64)
    assert choose_protocol("flipped", T5Config(), "channel").lengths("wsc") == (512, 512)
    chosen = choose_protocol("flipped", T5Config(), "flipped", max_source_length=300)
    assert chosen.lengths("hellaswag") == (300, 64)


def test_one_length_given_leaves_the_other():
    """Oracle: FLIPPED's lengths by task, the side that is given replaced by hand."""
    source = choose_protocol("flipped", T5Config(), "flipped", max_source_length=300)
    target = choose_protocol("flipped", T5Config(), "flipped", max_target_length=100)
    for task, at_300, at_100 in [
        ("rte", (300, 64), (512, 100)),
        ("hellaswag", (300, 64), (256, 100)),
        ("story_cloze", (300, 128), (256, 100)),
        ("wsc", (300, 128), (512, 100)),
    ]:
        assert (source.lengths(task), target.lengths(task)) == (at_300, at_100), task
    both = choose_protocol(
        "flipped", T5Config(), "flipped", max_source_length=300, max_target_length=100
    )
    assert both.lengths("wsc") == (300, 100) and both.task_lengths == {}


def test_targets_of_channel_are_as_long_as_a_source_that_is_given():
    """Oracle: the top of the module; a target length that is given as well stays."""
    longer = choose_protocol("t0", T5Config(), "channel", max_source_length=1024)
    assert longer.lengths("rte") == (1024, 1024)
    shorter = choose_protocol("flipped", T5Config(), "channel", max_target_length=100)
    assert shorter.lengths("wsc") == shorter.lengths("hellaswag") == (512, 100)


def test_what_is_printed_says_where_lengths_come_from():
    """Oracle: by hand. 1024 is the default of T0's own script."""
    t0 = PROTOCOLS["t0"].describe()
    assert "sources without special tokens, at most 512 tokens, targets 256 with end symbol" in t0
    assert "T0's own script reads 1024: --max-source-length 1024" in t0
    longer = choose_protocol("t0", T5Config(), "direct", max_source_length=1024)
    assert "own script" not in longer.describe()
    assert "story_cloze 256 and 128" in PROTOCOLS["flipped"].describe()


def test_white_space_is_folded_but_for_instructions():
    """Oracle: by hand."""
    example = EvaluationExample(0, " a\n b ", ["x\ty", "z"], 0, " a\n b ", "<extra_id_0>  c ")
    folded = PROTOCOLS["metro"].prepare(example)
    assert (folded.input, folded.choices) == ("a b", ["x y", "z"])
    assert (folded.flipped_input, folded.instruction) == (" a\n b ", "<extra_id_0>  c ")
    assert PROTOCOLS["flipped"].prepare(example) is example


class Letters:
    """A tokenizer like T5's: one id per letter, an end symbol 1, sentinels from 90."""

    eos_token_id = 1

    def get_vocab(self):
        return {"<extra_id_0>": 90}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*ids, 1] if add_special_tokens else ids}


@pytest.mark.parametrize(("special", "end"), [(True, [1]), (False, [])])
def test_t0_reads_sources_without_end_symbol_and_writes_targets_with_it(special, end):
    """Oracle: by hand. An empty source keeps one token, as none cannot be encoded."""
    encoder = PromptEncoder(Letters(), source_special_tokens=special)
    assert encoder.sources(["ab", ""]) == [[97, 98, *end], [1]]
    assert encoder.targets(["ab"]) == [[97, 98, 1]]
