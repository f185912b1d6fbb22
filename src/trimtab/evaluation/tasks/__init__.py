"""Levers on tasks of lm-eval, whose documents say what else a lever changes (docs/evaluations.md).

- `tasks.py`: which levers on which tasks, and what is refused.
- `model.py`: the harness's requests, put to a steered model.
- `files.py`: tasks by name, from lm-eval or a folder.
- `table.py`: figures with paired intervals.
"""
