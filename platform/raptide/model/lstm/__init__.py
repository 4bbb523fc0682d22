"""The paper's other model, a bidirectional LSTM: blind to the residue it predicts.

The transformer knows nothing of it; families.py is where the two meet.
"""
