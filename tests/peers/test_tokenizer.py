"""The common tests of transformers' tokenizers, run on METRO-T5's."""

import unittest

import pytest

from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
from tests.peers.source import peer_module, run_peers

pytestmark = pytest.mark.slow


@pytest.mark.client("tests of transformers", "the common ones of tokenizers")
def test_the_tokenizer_passes(golden, tmp_path):
    common = peer_module("test_tokenization_common")
    vocabulary = golden / "tiny_vocab"
    files = (vocabulary / "sp.model", vocabulary / "dict.txt")
    MetroT5Tokenizer(*map(str, files)).save_pretrained(tmp_path)

    class Tokenizer(common.TokenizerTesterMixin, unittest.TestCase):
        tokenizer_class = MetroT5Tokenizer
        tmpdirname, from_pretrained_id = str(tmp_path), [str(tmp_path)]
        tokenizers_list = [(MetroT5Tokenizer, str(tmp_path), {})]

        @classmethod
        def setUpClass(cls):
            """Nothing: the original reads a text that is not distributed, and no test uses."""

        @classmethod
        def tearDownClass(cls):
            pass

    run_peers(Tokenizer, {})
