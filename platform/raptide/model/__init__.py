"""The transformer over packed tokens, and the files that models come in.

In: settings, or a model's files. Out: hidden states, log probabilities, attention maps.
The way: formats, config, packed, attention, transformer, contacts.
"""
