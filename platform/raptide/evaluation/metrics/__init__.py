"""Numbers out of arrays: what the field calls by name, each with its convention."""
