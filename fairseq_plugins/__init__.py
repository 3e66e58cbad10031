"""METRO for fairseq: pass this folder as `--user-dir` (or `common.user_dir`) to fairseq's commands.

Importing it registers the tasks, models and criterion under their published names and applies the
repairs of `compat`. Everything that computes lives in `metro`; here options are translated, modules
called and sums logged.
"""

from fairseq_plugins import compat

compat.apply()

from fairseq_plugins import criterions, models, tasks  # noqa: E402, F401
