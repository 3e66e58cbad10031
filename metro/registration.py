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

    It is not among the finders while it waits for one, so that it sees the outermost alone: in the
    midst of another import the modules that METRO's models need may not be complete.
    """

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("transformers", "metro") or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = getattr(spec and spec.loader, "exec_module", None)
        if spec is None or execute is None:
            sys.meta_path.insert(0, self)
            return spec

        def exec_module(module):
            collects = gc.isenabled()
            gc.disable()
            try:
                execute(module)
            finally:
                if collects:
                    gc.enable()
                sys.meta_path.insert(0, self)
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
