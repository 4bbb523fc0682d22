"""What a run says of itself while it goes on.

In: each step's result, and the model as it stands. Out: held-out ECE, metrics, warnings, pictures.
The way: metrics, tracking, audit, watch, heldout, validation, progress, picture.
"""
