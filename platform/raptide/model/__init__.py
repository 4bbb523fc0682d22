"""The ESM family as one transformer over packed tokens."""
