"""What runs a cluster's days: jobs submitted and followed, nodes checked before they are trusted.

Everything goes through Ray's own job server; nothing here schedules or keeps state of its own.
"""
