"""METRO-T5 in the Auto classes of transformers, so that its folders load without remote code.

Two model types: ``metro_t5``, what METRO exports, and ``fairseq_t5``, the folders that the authors
of METRO-T0 released. A released folder becomes a :class:`MetroT5Config` and the models of
``metro.modeling``, whatever Python files lie in it.

``import metro`` must stay instant, so it cannot import transformers to register anything. Where
transformers is loaded already, :func:`register_on_import` registers at once; otherwise it puts a
finder in front of ``sys.meta_path`` that registers right after transformers has loaded its Auto
classes. The finder finds nothing by itself and takes itself out when it is done.
"""

import importlib.abc
import sys
import threading

_AUTO = "transformers.models.auto."
_done: set[str] = set()


def register() -> None:
    """Register everything now; imports transformers and torch."""
    import transformers.models.auto.modeling_auto  # noqa: F401
    import transformers.models.auto.tokenization_auto  # noqa: F401

    _register_loaded()


def register_on_import() -> None:
    """Register as soon as transformers' Auto classes are loaded, at once where they are."""
    if any(isinstance(finder, AfterTransformers) for finder in sys.meta_path):
        return
    _register_loaded()
    if len(_done) < len(_REGISTER):
        sys.meta_path.insert(0, AfterTransformers())


def _register_loaded() -> None:
    for name, function in _REGISTER.items():
        if _AUTO + name in sys.modules and name not in _done:
            _done.add(name)
            function()


def _register_configurations() -> None:
    from transformers import AutoConfig

    from metro.modeling.configuration_metro_t5 import MetroT5Config
    from metro.models.released_layout import FairseqT5Config

    AutoConfig.register(MetroT5Config.model_type, MetroT5Config, exist_ok=True)
    AutoConfig.register(FairseqT5Config.model_type, FairseqT5Config, exist_ok=True)


def _register_tokenizers() -> None:
    from transformers import AutoTokenizer

    from metro.modeling.configuration_metro_t5 import MetroT5Config
    from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
    from metro.models.released_layout import FairseqT5Config, FairseqT5Tokenizer

    AutoTokenizer.register(MetroT5Config, slow_tokenizer_class=MetroT5Tokenizer, exist_ok=True)
    # Released tokenizer_config.json files name this class, which is looked up by its name.
    AutoTokenizer.register(FairseqT5Config, slow_tokenizer_class=FairseqT5Tokenizer, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

    from metro.modeling.configuration_metro_t5 import MetroT5Config
    from metro.modeling.modeling_metro_t5 import (
        MetroT5EncoderModel,
        MetroT5ForConditionalGeneration,
    )

    AutoModelForSeq2SeqLM.register(MetroT5Config, MetroT5ForConditionalGeneration, exist_ok=True)
    AutoModel.register(MetroT5Config, MetroT5EncoderModel, exist_ok=True)
    AutoModelForTextEncoding.register(MetroT5Config, MetroT5EncoderModel, exist_ok=True)


# Module of transformers -> what to register once it is loaded.
_REGISTER = {
    "configuration_auto": _register_configurations,
    "tokenization_auto": _register_tokenizers,
    "modeling_auto": _register_models,
}


class AfterTransformers(importlib.abc.MetaPathFinder):
    """Counts the modules of transformers and METRO that are being imported, registers at zero.

    Not right after the Auto module itself: it may be imported from inside another module that
    METRO's models need, or from one of them, and that is not complete yet.
    """

    packages = ("transformers.", "metro.")

    def __init__(self):
        self.lock = threading.Lock()
        self.num_importing = 0

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(self.packages):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader) -> None:
        execute = loader.exec_module

        def exec_module(module):
            with self.lock:
                self.num_importing += 1
            try:
                execute(module)
            finally:
                with self.lock:
                    self.num_importing -= 1
                    is_outermost = self.num_importing == 0
            if is_outermost:
                _register_loaded()
                if len(_done) == len(_REGISTER) and self in sys.meta_path:
                    sys.meta_path.remove(self)

        loader.exec_module = exec_module
