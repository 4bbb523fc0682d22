"""What tasks measure, as samples: numbers with what their uncertainty comes from.

A module for each field, by that field's own conventions.
"""
