"""The engine: one loaded model that answers. It knows neither Ray nor HTTP.

In: protein sequences as strings. Out: embeddings, logits, contacts and scores as numpy arrays.
The way: calls/, batching, forward, engine.
"""
