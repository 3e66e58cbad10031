"""METRO for fairseq: pass this folder as `--user-dir` (or `common.user_dir`) to fairseq's commands.

Importing it applies the repairs of `compat` and registers the tasks, models and criteria under
their published names. Everything that computes is in `metro`; here options are translated, modules
called and sums logged.
"""

from fairseq_plugins import adam, compat, criterions, models, tasks  # noqa: F401
