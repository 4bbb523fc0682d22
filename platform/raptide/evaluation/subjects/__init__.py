"""Models and baselines: what tasks ask.

`subject.py` says what one is; `model.py` is the engine, the others are baselines.
"""
