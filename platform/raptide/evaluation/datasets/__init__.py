"""Files of labelled proteins, a format each: read, checked, and refused in one sentence."""
