"""Load on a deployed endpoint, and how it copes. It needs neither torch nor Ray.

In: an address and proteins. Out: throughput, latency and errors, level by level.
The way: requests, levels, report.
"""
