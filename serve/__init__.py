"""The Ray Serve application.

In: requests over HTTP and gRPC. Out: embeddings, scores, contacts, logits, each with its lineage.
The way: app composes it; gateway takes a request, replica computes; calls is what they say.
"""
