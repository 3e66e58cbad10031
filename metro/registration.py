"""``import metro`` makes METRO-T5 known to transformers' Auto classes, without importing them.

Where they are loaded already, the models are registered at once; otherwise at the end of the import
that loads them. Such imports make hardly any garbage: searching for it would be a sixth of the
time.
"""

import gc
import importlib.abc
import importlib.util
import sys

AUTO_CLASSES = [f"transformers.models.auto.{name}_auto" for name in ("configuration", "modeling")]


class RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself, and registers after an import of transformers or METRO.

    It sees the outermost import alone: in the midst of another the modules that METRO's models need
    may not be complete.
    """

    is_busy = False

    def find_spec(self, name, path=None, target=None):
        if self.is_busy or name.partition(".")[0] not in ("transformers", "metro"):
            return None
        self.is_busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_busy = False
        execute = getattr(spec and spec.loader, "exec_module", None)
        if spec is None or execute is None:
            return spec

        def exec_module(module):
            if self.is_busy or self not in sys.meta_path:
                return execute(module)
            self.is_busy = True
            collects = gc.isenabled()
            gc.disable()
            try:
                execute(module)
            finally:
                if collects:
                    gc.enable()
                self.is_busy = False
            self.register_if_loaded()

        vars(spec.loader)["exec_module"] = exec_module
        return spec

    def register_if_loaded(self) -> None:
        """Register if transformers' Auto classes are loaded, and leave the list of finders."""
        if any(module in sys.modules for module in AUTO_CLASSES):
            sys.meta_path.remove(self)
            from metro.models.auto_classes import register

            register()


def register_on_import() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    finder = RegisterAfterImport()
    sys.meta_path.insert(0, finder)
    finder.register_if_loaded()
