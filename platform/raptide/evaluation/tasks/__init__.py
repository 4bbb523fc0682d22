"""The kinds of tasks, a module each; `task.py` says what one is."""
