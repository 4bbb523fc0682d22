"""A replica: one engine on one device, whose batches are shared by many requests.

In: work from gateways. Out: arrays, or why there are none.
The way: deployment, plan, batcher.
"""
