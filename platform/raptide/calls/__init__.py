"""What every way of calling a model shares: the library, bulk jobs, the endpoint and its client.

In: what callers give. Out: residues, windows, variants, and numbers made of a model's. No torch.
The way: inputs, variants, windows, scoring.
"""
