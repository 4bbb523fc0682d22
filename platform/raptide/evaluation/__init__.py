"""What a model has learned: tasks, asked of models and baselines alike.

A benchmark names tasks; a task says what it wants read off a subject and makes measures of it; a
subject is a model or a baseline. Results are rows, a number each, kept by what they depend on.
"""
